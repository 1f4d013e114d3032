import os
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_shards import data_of, write_tar, write_world

from data_pipelines.shards.archive import RangeReader
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import load_index
from umm_zoo.batch import stacked


def test_members_are_read_where_tarfile_finds_them(tmp_path):
    rows = {f"dir/k{n}": {"json": b"{}" * n, "0.png": os.urandom(700 * n), "cls": b""} for n in range(1, 6)}
    write_tar(tmp_path / "a.tar", rows)
    index, reader = load_index(str(tmp_path / "a.tar")), RangeReader()
    assert {index.key(n): reader.members(index, n) for n in range(len(index))} == rows


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_format_with_long_and_foreign_names(tmp_path, layout):
    long = "folder/" + "x" * (80 if layout == tarfile.USTAR_FORMAT else 180)
    with tarfile.open(tmp_path / "a.tar", "w", format=layout) as tar:
        for name in (f"./{long}.TXT", f"./{long}.0.png", "été.TXT"):
            (tmp_path / "member").write_text(name)
            tar.add(tmp_path / "member", name)
    index = load_index(str(tmp_path / "a.tar"))
    found = {index.key(n): RangeReader().members(index, n) for n in range(2)}
    both = {"txt": f"./{long}.TXT".encode(), "0.png": f"./{long}.0.png".encode()}
    assert found == {long: both, "été": {"txt": "été.TXT".encode()}}


def test_members_far_apart_are_one_sample(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, size in (("a.txt", 5), ("b.bin", 300_000), ("a.json", 7)):
            (tmp_path / "member").write_bytes(b"%d" % (size % 10) * size)
            tar.add(tmp_path / "member", name)
    index = load_index(str(tmp_path / "a.tar"))
    assert RangeReader().members(index, 0) == {"txt": b"5" * 5, "json": b"7" * 7}


def test_more_shards_than_files_may_be_open(tmp_path):
    write_world(tmp_path, [1] * 70)
    indexes, reader = [load_index(path) for path in expand(str(tmp_path))], RangeReader()
    for _ in range(2):
        assert all(reader.members(index, 0)["json"] for index in indexes)
    assert len(reader._open) == 64


def test_an_index_goes_to_the_cache_where_the_folder_is_read_only(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", {"k": {"json": b"{}"}})
    from data_pipelines.shards import indexing

    real = indexing.write_json
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse_beside(place, content):
        if "cache" not in place:
            raise PermissionError(13, "Permission denied")
        real(place, content)

    monkeypatch.setattr(indexing, "write_json", refuse_beside)
    assert len(load_index(str(tmp_path / "a.tar"))) == 1
    assert not (tmp_path / "a.tar.index.json").exists() and len(list((tmp_path / "cache").rglob("*.json"))) == 1


def test_patterns_name_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("s-08.tar", "s-09.tar", "s-10.tar", "t.tar", "note.txt"):
        Path(name).touch()
    assert expand("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand("s-*") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert expand(["t.tar", "s-1?.tar"]) == ["t.tar", "s-10.tar"]
    assert [Path(path).name for path in expand(str(tmp_path))] == ["s-08.tar", "s-09.tar", "s-10.tar", "t.tar"]


class Ranges(BaseHTTPRequestHandler):
    """A web server with range requests, which counts the bytes it sends."""

    root: Path
    sent = 0
    counting = threading.Lock()

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content, asked = path.read_bytes(), self.headers.get("Range")
        low, high = 0, len(content)
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            low, high = int(first), min(int(last) + 1, high) if last else high
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(high - low))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {low}-{high - 1}/{len(content)}")
        if body:  # before anything is sent: whoever has it must find it counted
            with self.counting:
                type(self).sent += high - low
        self.end_headers()
        if body:
            self.wfile.write(content[low:high])

    def log_message(self, *arguments):
        pass


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, type[Ranges]]]:
    """Address of a server of a folder's files, and its handler."""
    handler = type("Handler", (Ranges,), {"root": folder, "sent": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        server.shutdown()


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_shards_on_a_web_server_give_the_same_batches_by_range_reads(tmp_path, workers):
    pytest.importorskip("fsspec")
    pytest.importorskip("aiohttp")
    world = write_world(tmp_path, [5, 6])
    local = next(iter(data_of(world).train_dataloader()))  # writes the indexes
    with served(tmp_path) as (address, handler):
        source = ShardSource(f"{address}/part-{{000..001}}.tar")
        data = ShardData(train={"a": source}, batch_size=8, window=2, image_size=8, num_workers=workers)
        data.check()
        indexes = sum(path.stat().st_size for path in tmp_path.glob("*.json"))
        assert handler.sent == indexes  # opening fetches no shard
        remote = next(iter(data.train_dataloader()))
        assert remote.keys == local.keys and stacked(remote.images).equal(stacked(local.images))
