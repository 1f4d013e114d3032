import hashlib
import json
import tarfile
from pathlib import Path

import pytest
from test_shards import add

from data_pipelines.shards.headers import split_member_name
from data_pipelines.shards.index import load_index
from data_pipelines.shards.indexing import build_index, index_path, index_tar
from data_pipelines.shards.writing import IndexedShardWriter, write_shards


def some_samples(count):
    kinds = ("even", "odd")
    return [{"__key__": f"s{i:03d}", "json": {"kind": kinds[i % 2]}, "0.png": bytes([i]) * (i + 1)} for i in range(count)]


def test_offsets_read_back_the_bytes(tmp_path):
    summary = write_shards(some_samples(7), tmp_path, "part", samples_per_shard=3)
    assert [path.name for path in summary.shards] == ["part-000000.tar", "part-000001.tar", "part-000002.tar"]
    read = []
    for path in summary.shards:
        content = path.read_bytes()
        index = json.loads(index_path(path).read_text())
        assert index["version"] == 3 and index["tar_size"] == len(content)
        assert index["sha256"] == hashlib.sha256(content).hexdigest()
        shard = load_index(str(path))
        for number, key in enumerate(shard.keys()):
            places = {name: slice(offset, offset + size) for name, offset, size in shard.members(number)}
            read.append((key, content[places["0.png"]], json.loads(content[places["json"]])["kind"]))
    assert read == [(s["__key__"], s["0.png"], s["json"]["kind"]) for s in some_samples(7)]


def test_summary_counts_what_was_written(tmp_path):
    summary = write_shards(some_samples(5), tmp_path, "part", samples_per_shard=2)
    assert (summary.samples, summary.members, summary.kinds) == (5, {"json": 5, "0.png": 5}, {"even": 3, "odd": 2})
    assert index_tar(summary.shards[-1])["counts"] == {"samples": 1, "members": {"0.png": 1, "json": 1}}


def test_bytes_depend_on_samples_alone(tmp_path):
    first, second = (write_shards(some_samples(4), tmp_path / name, "part").shards[0] for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()


def test_webdataset_reads_the_shard(tmp_path):
    import webdataset as wds

    path = write_shards(some_samples(3), tmp_path, "part").shards[0]
    rows = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [(row["__key__"], row["0.png"]) for row in rows] == [(s["__key__"], s["0.png"]) for s in some_samples(3)]


def test_failure_leaves_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError), IndexedShardWriter(tmp_path, "part", samples_per_shard=2) as writer:
        for sample in some_samples(3):
            writer.write(sample)
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000000.tar", "part-000000.tar.index.json"]


def test_no_samples_leave_no_file(tmp_path):
    assert write_shards([], tmp_path, "part").shards == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ({"json": {}}, "__key__"),
        ({"__key__": "a.b", "json": {}}, "without a dot"),
        ({"__key__": "a", "0.png": 3}, "is int"),
        ({"__key__": "a"}, "no members"),
    ],
)
def test_bad_samples_are_refused(tmp_path, sample, words):
    with pytest.raises(ValueError, match=words):
        write_shards([sample], tmp_path, "part")
    assert list(tmp_path.iterdir()) == []


def test_repeated_key_is_refused_across_shards(tmp_path):
    with pytest.raises(ValueError, match="'s000' came twice"):
        write_shards([*some_samples(2), *some_samples(1)], tmp_path, "part", samples_per_shard=1)


def test_duplicates_and_strangers_are_reported(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.json", b"1"), ("b.json", b"2"), ("a.json", b"3"), (".hidden", b"4"), ("README", b"5")):
            add(tar, name, data)
    index = json.loads(Path(build_index(str(tmp_path / "x.tar"))).read_text())
    assert (index["duplicates"], index["skipped"]) == (["a.json"], [".hidden", "README"])
    [(_, offset, size)] = load_index(str(tmp_path / "x.tar")).members(0)
    assert (tmp_path / "x.tar").read_bytes()[offset : offset + size] == b"1"


def test_cut_and_compressed_tars_are_refused(tmp_path):
    path = write_shards([{"__key__": "a", "json": b"j" * 5000}], tmp_path, "part").shards[0]
    (tmp_path / "cut.tar").write_bytes(path.read_bytes()[:3000])
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        add(tar, "a.json")
    with pytest.raises(ValueError, match="cut short"):
        index_tar(tmp_path / "cut.tar")
    with pytest.raises(ValueError, match="not a plain"):
        index_tar(tmp_path / "x.tar.gz")
    with pytest.raises(ValueError, match="no such tar"):
        index_tar(tmp_path / "none.tar")


def test_member_names():
    assert split_member_name("./a/b.c/d.0.PNG") == ("a/b.c/d", "0.png")
    assert split_member_name("a/.json") == split_member_name("plain") == split_member_name("a.") == ("", "")
