"""One sample that no parser takes, in a tar whose headers may lie, costs that sample alone and is named."""

import gzip
import json
from dataclasses import replace

import pytest
from test_shards import png, sample

from data_pipelines import index, overlap
from data_pipelines.inspect import inspect
from data_pipelines.overlap import PromptIndex, find_overlaps
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.index import _kept_columns
from data_pipelines.shards.indexing import index_tar
from data_pipelines.shards.streaming import StreamData
from umm_zoo.errors import UserError


def header(name: bytes, size: int, kind: bytes = b"0", field: bytes = b"") -> bytes:
    """A header as POSIX.1-1988 has it; ``field`` in place of the octal size."""
    block = bytearray(512)
    for place, value in ((0, name[:100]), (100, b"0000644\0"), (108, b"0000000\0"), (116, b"0000000\0"), (136, b"00000000000\0")):
        block[place : place + len(value)] = value
    block[124:136] = field or b"%011o\0" % size
    block[148:157], block[257:265] = b"        " + kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: bytes, content: bytes, **options) -> bytes:
    return header(name, len(content), **options) + content + bytes(-len(content) % 512)


def pax(key: str, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(record := b"%d %s=%s\n" % (length, key.encode(), value)) != length:
        length += 1
    return member(b"pax", record, kind=b"x")


def rows(text: str = "x", key: bytes = b"bad") -> bytes:
    turns = [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": text}]
    return member(key + b".json", json.dumps({"conversations": turns}).encode())


def parsed(content: str) -> bytes:
    return member(b"bad.json", content.encode()) + IMAGE


IMAGE = member(b"bad.0.png", png(1))
TURNS = '"conversations": [{"role": "user", "text": "<image>"}]'
NOT_UTF8 = "name of a member is not UTF-8"
MISSING = "member 'json' is missing (found 0.png)"
CASES = {
    "digits": (parsed(f'{{{TURNS}, "n": {"9" * 5000}}}'), "4300 digits"),
    "surrogate": (rows("\ud800") + IMAGE, "not UTF-8: it holds '\\ud800'"),
    "list": (parsed('{"conversations": [{"role": ["user"], "text": "<image>"}]}'), "role"),
    "object": (parsed('{"conversations": [{"role": {}, "text": "<image>"}]}'), "role"),
    "deep": (parsed(f'{{{TURNS}, "n": {"[" * 30_000 + "]" * 30_000}}}'), "recursion"),
    "utf16": (member(b"bad.json", "{}".encode("utf-16")) + IMAGE, "not UTF-8"),
    "empty": (member(b"bad.json", b"") + IMAGE, "json cannot be parsed"),
    "number": (rows() + pax("path", b"bad." + b"9" * 5000 + b".png") + IMAGE, "4300 digits"),
    "extension": (rows() + member(b"bad.\xe9.png", png(1)), NOT_UTF8),
    "pax name": (pax("path", b"bad.\xe9") + rows() + IMAGE, NOT_UTF8),
    "pax size below": (pax("size", b"3") + rows("x" * 2000) + IMAGE, "headers state 2091 and 3 bytes"),
    "pax size above": (pax("size", b"5000") + rows() + IMAGE, "headers state 92 and 5000 bytes"),
    "pax size below 0": (pax("size", b"-5") + rows() + IMAGE, "headers state 92 and -5 bytes"),
    "pax size no number": (pax("size", b"many") + rows() + IMAGE, "headers state 92 and many bytes"),
    "negative": (header(b"bad.json", 0, field=b"\xff" * 12) + IMAGE, "header states -1 bytes"),
    "endless": (header(b"bad.json", 0, field=b"\x80" + b"\x7f" * 11) + IMAGE, MISSING),
    "checksum": (b"?" + rows()[1:] + IMAGE, MISSING),
    "sparse": (pax("GNU.sparse.realsize", b"9" * 15) + pax("GNU.sparse.map", b"0,1") + rows() + IMAGE, MISSING),
    "old sparse": (member(b"bad.json", b"{}", kind=b"S") + IMAGE, MISSING),
    "link": (header(b"bad.json", 0, kind=b"2") + IMAGE, MISSING),
    "beyond the tar": (header(b"bad.json", 10**7) + rows()[512:] + IMAGE, "states 10000000 bytes, more than the tar holds"),
    "last member beyond": (rows() + header(b"bad.0.png", 10**7) + IMAGE[512:], "states 10000000 bytes, more than the tar holds"),
    "pax size beyond": (pax("size", b"9" * 11) + rows() + IMAGE, "99999999999 bytes, more than the tar holds"),
    "pax before damage": (pax("path", b"bad.json") + b"?" + rows()[1:] + IMAGE, MISSING),
    "pax before pax before damage": (pax("path", b"bad.json") * 2 + b"?" + rows()[1:] + IMAGE, MISSING),
    "long name before damage": (member(b"long", b"bad.json", kind=b"L") + b"?" + rows()[1:] + IMAGE, MISSING),
    "pax of a length of 5000 digits": (member(b"pax", b"9" * 5000 + b" path=bad.json\n", kind=b"x") + rows() + IMAGE, ""),
    "sparse map of words": (pax("GNU.sparse.map", b"a,b") + rows() + IMAGE, MISSING),
    "pax of pax without end": (pax("path", b"x") * 2000 + rows(key=b"other"), ""),
    "not a number": (parsed(f'{{{TURNS}, "n": NaN}}'), "NaN, which JSON does not have"),
    "infinity": (parsed(f'{{{TURNS}, "n": [{{"m": -Infinity}}]}}'), "-Infinity, which JSON does not have"),
    "overflow": (parsed(f'{{{TURNS}, "n": 1e999}}'), "1e999, which no float holds"),
    "key twice": (parsed(f'{{{TURNS}, "n": 1, "n": 2}}'), "key twice in one object: 'n'"),
    "endless header": (header(b"long", 0, kind=b"L", field=b"07777777777\0") + rows() + IMAGE, ""),
}


def tar(folder, content: bytes):
    """Twelve good samples, and ``content`` in the midst of them."""
    good = [b"".join(member(f"g{n}.{name}".encode(), part) for name, part in sample(n).items()) for n in range(12)]
    (folder / "a.tar").write_bytes(b"".join([*good[:5], content, *good[5:], bytes(1024)]))
    return folder / "a.tar"


@pytest.mark.parametrize("module", [ShardData, StreamData])
@pytest.mark.parametrize("case", CASES)
def test_a_sample_that_no_parser_takes_is_named_and_the_others_are_read(tmp_path, module, case):
    content, reason = CASES[case]
    data = module({"a": ShardSource(str(tar(tmp_path, content)))}, batch_size=13, image_size=8, seed=2)
    stream = iter(data.train_dataloader())
    keys = {key.split(":")[1] for _ in range(1 if module is ShardData else 2) for key in next(stream).keys}
    assert keys - {"bad"} == {f"g{n}" for n in range(12)}
    skips = [skip for skip in data.ledger.skips if skip.key == "bad"]
    if reason:
        assert "bad" not in keys and skips and reason in skips[0].reason and skips[0].shard == str(tmp_path / "a.tar")


@pytest.mark.parametrize("module", [ShardData, StreamData])
def test_a_key_that_is_not_utf8_is_named_by_its_bytes(tmp_path, module):
    content = rows(key=b"caf\xe9") + member(b"caf\xe9.0.png", png(1))
    data = module({"a": ShardSource(str(tar(tmp_path, content)))}, batch_size=13, image_size=8)
    stream = iter(data.train_dataloader())
    [next(stream) for _ in range(2)]
    assert {str(skip) for skip in data.ledger.skips} == {rf"a/a.tar:caf\xe9: the {NOT_UTF8}"}


@pytest.mark.parametrize("case", ["digits", "surrogate", "list", "deep", "utf16", "pax name", "pax size above", "negative"])
def test_inspect_and_overlap_name_it_and_go_on(tmp_path, case):
    path = str(tar(tmp_path, CASES[case][0]))
    findings = inspect([path])
    assert (findings.samples, list(findings.bad)) == (13, [f"{path}:bad"]) and CASES[case][1] in findings.bad[f"{path}:bad"]
    report = find_overlaps([path], PromptIndex(["which one is it of all of them"]))
    assert report["samples"] == 13


@pytest.mark.parametrize("lie", [{"keys": list("abcdefghijkl")}, {"offsets": []}], ids=["of another tar", "that is none"])
def test_inspect_and_overlap_go_on_after_a_shard_with_an_index(tmp_path, lie, capsys):
    data = two_shards(tmp_path, lambda good: tar(tmp_path, b"").read_bytes())
    data.open("train")
    place = tmp_path / "a.tar.index.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | lie, separators=(",", ":")))
    _kept_columns.cache_clear()
    findings = inspect([str(tmp_path / "a.tar"), str(tmp_path / "b.tar")])
    assert findings.samples == 12 and "makes a new index" in str(findings.unreadable[0])
    (tmp_path / "prompts.txt").write_text("which one is it of all of them")
    arguments = [
        str(tmp_path / "a.tar"),
        str(tmp_path / "b.tar"),
        str(tmp_path / "prompts.txt"),
        "--report",
        str(tmp_path / "r.json"),
    ]
    assert overlap.run(overlap.main, overlap.parser().parse_args(arguments)) == 2
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["samples"] == 12 and list(report["unreadable_shards"]) == [str(tmp_path / "a.tar")]
    assert "error: " in capsys.readouterr().err


def test_damaged_headers_are_listed_by_the_index(tmp_path):
    content = index_tar(tar(tmp_path, CASES["checksum"][0]))
    assert content["counts"]["samples"] == 13
    assert content["skipped"] == ["2 blocks before bad.0.png are no header (bad checksum)"]
    assert content["counts"]["damage"] == content["skipped"]


BROKEN = {
    "cut": lambda good: good[:-1600],
    "no tar": lambda good: b"no tar at all" * 100,
    "html": lambda good: b"<html>" + bytes(5000),
    "compressed": gzip.compress,
    "empty": lambda good: b"",
    "without a sample": lambda good: bytes(10240),
}


def two_shards(folder, content):
    whole = tar(folder, rows(key=b"g12") + member(b"g12.0.png", png(1)))
    (folder / "b.tar").write_bytes(content(whole.read_bytes()))
    return ShardData({"a": ShardSource(str(folder))}, batch_size=13, image_size=8, max_skips=1, val={"v": ShardSource(str(folder))})


@pytest.mark.parametrize("kind", BROKEN)
def test_a_shard_that_cannot_be_used_is_named_counted_and_left_out(tmp_path, kind, caplog):
    data = two_shards(tmp_path, BROKEN[kind])
    assert len(next(iter(data.train_dataloader()))) == data.stream.num_samples == 13
    [skip] = data.ledger.skips
    assert (skip.stage, skip.source, skip.shard, skip.key) == ("train", "a", str(tmp_path / "b.tar"), "*")
    assert skip.reason.startswith("shard left out: ") and f"skipped a/b.tar:*: {skip.reason}" in caplog.text
    data.open("val")
    assert [skip.stage for skip in data.ledger.skips] == ["train", "val"]


def change_after_indexing(good):
    return good[:-2048] + bytes(1024)


@pytest.mark.parametrize("content", [change_after_indexing, lambda good: good.replace(b"user", b"USER", 1)], ids=["cut", "flipped"])
def test_a_shard_that_was_damaged_after_it_was_indexed_is_left_out_too(tmp_path, content):
    data = two_shards(tmp_path, bytes)
    replace(data).prepare_data()  # by an earlier run
    (tmp_path / "b.tar").write_bytes(content((tmp_path / "b.tar").read_bytes()))
    assert data.stream.num_samples == 13 and "makes a new index" in next(iter(data.ledger.skips)).reason


def test_more_bad_shards_than_max_skips_stop_the_run_with_their_list(tmp_path):
    data = two_shards(tmp_path, BROKEN["no tar"])
    (tmp_path / "c.tar").write_bytes(b"none either" * 100)
    with pytest.raises(UserError, match=r"max_skips: found 2 bad samples, expected 1; a/b\.tar:\*: .*not a plain.*; a/c\.tar:\*: "):
        data.check()


def test_without_a_usable_shard_the_first_reason_is_said(tmp_path):
    (tmp_path / "b.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "c.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"^data: .*b\.tar: not a plain \(uncompressed\) tar file"):
        ShardData({"a": ShardSource(str(tmp_path))}, image_size=8).check()


def test_a_shard_that_is_not_there_still_stops_the_run(tmp_path):
    tar(tmp_path, b"")
    with pytest.raises(UserError, match=r"missing\.tar: no shard"):
        ShardData({"a": ShardSource([str(tmp_path / "a.tar"), str(tmp_path / "missing.tar")])}, image_size=8).check()


def test_control_characters_of_a_key_are_escaped(tmp_path, caplog):
    path = tar(tmp_path, member(b"a\nerror: forged\x1b[2J.json", b"{}"))
    data = ShardData({"a": ShardSource(str(path))}, batch_size=13, image_size=8)
    next(iter(data.train_dataloader()))
    assert r"a\nerror: forged\x1b[2J: json has no 'conversations'" in caplog.text


@pytest.mark.parametrize("cut", [1024, 1536])
def test_a_tar_that_is_cut_between_two_members_is_refused(tmp_path, cut):
    path = tar(tmp_path, b"")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match=rf"^{path}: cut short "):
        index_tar(path)


def test_a_text_that_begins_like_nothing_is_no_tar(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>" + bytes(1000) + rows() + bytes(1024))
    with pytest.raises(UserError, match="not a plain"):
        index_tar(tmp_path / "a.tar")


def test_the_index_command_names_what_cannot_be_used_and_goes_on(tmp_path, capsys):
    tar(tmp_path, rows(key=b"caf\xe9"))
    (tmp_path / "b.tar").write_bytes(rows() + bytes(1024))
    assert index.run(index.main, index.parser().parse_args([str(tmp_path)])) == 0
    printed = capsys.readouterr().out
    assert rf"1 samples cannot be used: caf\xe9 (the {NOT_UTF8})" in printed and "b.tar.index.json: 1 samples" in printed
