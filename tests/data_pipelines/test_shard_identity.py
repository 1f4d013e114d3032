"""A shard is its content: another content of the same name and size is not read by an old index, and not served old outputs."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from test_shards import data_of, sample, write_tar

from data_pipelines import index
from data_pipelines.shards import hashing, indexing, remote
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import load_index
from umm_zoo.errors import UserError

CHANGED = r"a\.tar: its content is not what its index was made for"


@pytest.fixture
def tar(tmp_path, monkeypatch):
    """A shard with its index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    write_tar(tmp_path / "w/a.tar", {f"k{n}": sample(n) for n in range(4)})
    data_of(tmp_path / "w").check()
    return tmp_path / "w/a.tar"


def change(tar, seconds: int = 0) -> None:
    """Put other words of the same length into the shard, ``seconds`` older than it was."""
    time = os.stat(tar).st_mtime_ns
    tar.write_bytes(tar.read_bytes().replace(b"Which?", b"Where?"))
    if seconds:
        os.utime(tar, ns=(time, time - seconds * 10**9))


@pytest.fixture
def digests(monkeypatch):
    """Files whose content was hashed."""
    hashed, real = [], indexing.content_of
    monkeypatch.setattr(indexing, "content_of", lambda path: hashed.append(path) or real(path))
    return hashed


@pytest.mark.parametrize("seconds", [0, 3600, 10**6])
def test_another_content_of_equal_size_is_refused_whether_newer_or_older(tar, seconds):
    change(tar, seconds)
    with pytest.raises(UserError, match=CHANGED):
        load_index(str(tar))


def test_a_shard_whose_time_is_the_same_is_not_hashed(tar, digests):
    load_index(str(tar))
    assert digests == []


def test_a_copy_is_hashed_once(tar, digests, tmp_path):
    shutil.copytree(tar.parent, tmp_path / "copy", copy_function=shutil.copyfile)
    for _ in range(3):
        load_index(str(tmp_path / "copy/a.tar"))
    assert digests == [str(tmp_path / "copy/a.tar")]


def test_a_copy_in_a_folder_of_others_is_hashed_once(tar, digests, monkeypatch):
    os.utime(tar)
    monkeypatch.setattr(indexing.os, "utime", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    for _ in range(3):
        load_index(str(tar))
    assert len(digests) == 1
    change(tar)
    with pytest.raises(UserError, match=CHANGED):
        load_index(str(tar))


def test_inspect_verifies_content_and_places_whatever_the_times_say(tar, tmp_path, capsys):
    write_tar(tmp_path / "w/b.tar", {"m": sample(9)})
    place, times = tar.with_name("a.tar.index.json"), os.stat(tar)
    assert call(tmp_path / "w", "--verify") == 0
    content = json.loads(place.read_text())
    place.write_text(json.dumps(content | {"keys": ["other", *content["keys"][1:]]}, separators=(",", ":")))
    os.utime(place, ns=(times.st_mtime_ns,) * 2)
    assert call(tmp_path / "w", "--verify", "--every", "9") == 2 and "its keys are not those of the tar" in capsys.readouterr().err
    place.write_text(json.dumps(content, separators=(",", ":")))
    change(tar)
    for path in (tar, place):
        os.utime(path, ns=(times.st_mtime_ns,) * 2)  # somebody has put the time back
    assert call(tmp_path / "w") == 0
    assert call(tmp_path / "w", "--verify") == 2
    printed = capsys.readouterr()
    assert "a.tar: found sha256 " in printed.err and "1 samples read from 1 shards" in printed.out


def call(folder, *options: str) -> int:
    from data_pipelines import inspect

    arguments = inspect.parser().parse_args([str(folder), "--sheet", str(folder / "sheet.png"), *options])
    return inspect.run(inspect.main, arguments)


def test_a_tar_that_is_none_does_not_hide_the_others_from_inspect(tar, tmp_path, capsys):
    (tmp_path / "w/broken.tar").write_bytes(b"<html>" * 200)
    assert call(tmp_path / "w") == 2
    printed = capsys.readouterr()
    assert "4 samples read from 1 shards" in printed.out and "broken.tar: not a plain" in printed.err


def index_missing(address: str) -> int:
    return index.run(index.main, index.parser().parse_args([address, "--missing"]))


def test_an_index_that_lies_beside_a_remote_shard_is_read_there(tar, capsys):
    files = pytest.importorskip("fsspec").filesystem("memory")
    for suffix in ("", ".index.json"):
        files.pipe(f"/w/a.tar{suffix}", Path(f"{tar}{suffix}").read_bytes())
    assert index_missing("memory://w/a.tar") == 0
    assert capsys.readouterr().out == "memory://w/a.tar.index.json: 4 samples\n"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 2, "counts": {}}', "[" * 100_000])
def test_an_index_that_is_none_is_one_line_for_the_command(tar, capsys, text):
    tar.with_name("a.tar.index.json").write_text(text)
    assert index_missing(str(tar)) == 2
    line, failed = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tar}.index.json: ") and line.endswith("makes a new index") and "1 of 1 shards" in failed


def test_hashing_that_takes_long_says_so(tar, capsys, monkeypatch):
    expected = hashlib.sha256(tar.read_bytes()).hexdigest()
    assert hashing.content_of(tar) == expected and not capsys.readouterr().err
    monkeypatch.setattr(hashing, "PATIENCE", -1.0)
    assert hashing.content_of(tar) == expected and "note: content of a.tar is hashed" in capsys.readouterr().err


@pytest.mark.parametrize(("fault", "tries"), [(ConnectionResetError("reset"), 3), (PermissionError("no"), 1)])
def test_a_listing_from_afar_is_tried_again_after_transient_faults_alone(monkeypatch, fault, tries):
    files = pytest.importorskip("fsspec").filesystem("memory")
    files.pipe("/listed/a.tar", b"")
    asked, real = [], type(files).glob

    def glob(self, pattern, **options):
        asked.append(pattern)
        if len(asked) < 3:
            raise fault
        return real(self, pattern, **options)

    monkeypatch.setattr(type(files), "glob", glob)
    monkeypatch.setattr(remote, "DELAYS", (0.0, 0.0, 0.0))
    remote.take_faults()
    if tries == 1:
        with pytest.raises(UserError, match=r"memory://listed/\*\.tar: it may not be read"):
            expand("memory://listed/*.tar")
    else:
        assert expand("memory://listed/*.tar") == ["memory:///listed/a.tar"] and remote.take_faults().total() == 2
    assert len(asked) == tries
