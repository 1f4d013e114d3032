"""Shards on a web server that misbehaves: transient faults are tried again and counted, permanent ones are said by address."""

import json
import os
import socket
import struct
import time
from contextlib import contextmanager
from email.utils import formatdate

import pytest
from test_archive import Ranges, served
from test_shards import data_of, fit, sample, write_tar, write_world

from data_pipelines.shards import addresses, remote
from data_pipelines.shards.cache import ShardCache
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.expanding import expand
from data_pipelines.shards.index import load_index
from data_pipelines.shards.remote import shown
from data_pipelines.shards.streaming import StreamData
from umm_zoo.batch import stacked
from umm_zoo.errors import UserError

#: They start a real server, and wait for its faults.
pytestmark = pytest.mark.processes

pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")


class Scripted(Ranges):
    """Follows a script for GETs of tars by range: a status, ``reset``, ``hang``, ``short`` or ``less``; then behaves."""

    script: list = []
    asked = 0
    named: dict[str, str] = {}
    ranges = True

    def send_response(self, code, message=None):
        super().send_response(code, message)
        for name, value in self.named.items():
            self.send_header(name, value)

    def do_GET(self, body=True):  # noqa: N802 - the base class's name
        if body and not self.ranges:
            del self.headers["Range"]
        if not body or not self.path.endswith(".tar") or "Range" not in self.headers:
            return super().do_GET(body)
        type(self).asked += 1
        act = self.script.pop(0) if self.script else None
        if isinstance(act, int | tuple):
            code, headers = act if isinstance(act, tuple) else (act, {})
            self.send_response(code)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
        elif act == "hang":
            time.sleep(addresses.TIMEOUT + 1)
        elif act == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif act in ("short", "less"):
            low, high = (int(end) for end in self.headers["Range"].removeprefix("bytes=").split("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {low}-{high}/{(self.root / self.path[1:]).stat().st_size}")
            self.send_header("Content-Length", str(high + 1 - low if act == "short" else 7))
            self.end_headers()
            self.wfile.write(b"x" * 7)
            self.close_connection = True
        else:
            super().do_GET(body)


@contextmanager
def scripted(folder, *script, **named):
    with served(folder) as (address, handler):
        handler.__bases__ = (Scripted,)
        handler.script, handler.asked, handler.named = (
            list(script),
            0,
            {key.replace("_", "-"): value for key, value in named.items()},
        )
        yield address, handler


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(remote, "DELAYS", (0.01, 0.02, 0.03))
    monkeypatch.setattr(addresses, "TIMEOUT", 9.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    remote.take_faults()


def world(folder):
    """Two shards with their indexes."""
    path = write_world(folder / "w", [5, 6])
    data_of(path).check()
    return path


def far(address, **options):
    return ShardData(train={"a": ShardSource(f"{address}/part-{{000..001}}.tar")}, batch_size=11, window=2, image_size=8, **options)


FAULTS = {
    503: "the server answers 503",
    429: "the server answers 429",
    500: "the server answers 500",
    "reset": "the connection was lost",
    "hang": "time-out",
    "short": "the connection was lost",
    "less": "the connection was lost (7 of",
}


@pytest.mark.parametrize("act", FAULTS)
def test_a_transient_fault_is_tried_again_and_counted_in_the_ledger(tmp_path, act, monkeypatch):
    times = 2
    if act == "hang":
        times = 1  # which takes the whole time-out: long enough that a busy machine's answers are in time
        monkeypatch.setattr(addresses, "TIMEOUT", 3.0)
    near = next(iter(data_of(world(tmp_path), batch_size=11, window=2).train_dataloader()))
    with scripted(tmp_path / "w", *[act] * times) as (address, _):
        data = far(address)
        model = fit(data, tmp_path / "run", 1)
    assert model.seen == near.keys
    [(what, count)] = json.loads((tmp_path / "run/data.json").read_text())["tried again"].items()
    least = times - (act == "reset")  # aiohttp tries a reset once itself
    assert what.startswith(f"{address}: {FAULTS[act]}") and least <= count <= times


@pytest.mark.parametrize("form", [lambda when: "1", lambda when: formatdate(when, usegmt=True)])
def test_a_server_that_says_when_to_come_back_is_believed(tmp_path, form):
    world(tmp_path)
    with scripted(tmp_path / "w") as (address, handler):
        loader = iter(far(address).train_dataloader())
        when = int(time.time()) + 2
        handler.script = [(429, {"Retry-After": form(when)})]
        assert len(next(loader).keys) == 11 and time.time() > when - 1.1


def test_the_faults_of_a_resumed_run_are_added_to_those_before(tmp_path):
    world(tmp_path)
    with scripted(tmp_path / "w", 503) as (address, handler):
        fit(far(address), tmp_path / "run", 1)
        handler.script = [503, 503]
        fit(far(address), tmp_path / "run", 2, tmp_path / "run/at-step=1.ckpt")
        assert list(json.loads((tmp_path / "run/data.json").read_text())["tried again"].values()) == [3]
        fit(far(address), tmp_path / "run", 1)
        assert "tried again" not in json.loads((tmp_path / "run/data.json").read_text())


def one_line(caught) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("act", "found"), [(404, "404"), (403, "403"), (410, "410"), (401, "401"), (400, "400")])
def test_a_permanent_fault_is_said_at_once_by_address_without_secrets(tmp_path, act, found):
    world(tmp_path)
    with scripted(tmp_path / "w", *[act] * 9) as (address, handler):
        place = address.replace("http://", "http://me:secret@")
        loader = iter(far(place).train_dataloader())
        with pytest.raises(UserError) as caught:
            next(loader)
        assert handler.asked == 1
    assert one_line(caught).startswith(f"data: {address}/part-00") and found in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_fault_that_does_not_pass_is_said_with_the_number_of_tries(tmp_path):
    world(tmp_path)
    with scripted(tmp_path / "w", *[503] * 9) as (address, handler):
        with pytest.raises(UserError, match=r"part-00.\.tar: the server answers 503.*, 4 times in 0 s$"):
            next(iter(far(address).train_dataloader()))
        assert handler.asked == 4


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("http://no-such-host.invalid/x.tar", "unknown host no-such-host.invalid"),
        ("http://127.0.0.1:9/x.tar?token=secret", "no connection to 127.0.0.1:9, 4 times"),
    ],
)
def test_a_server_that_is_not_there_is_named(address, found):
    with pytest.raises(UserError) as caught:
        load_index(address)
    assert found in one_line(caught) and "secret" not in str(caught.value)


def test_a_certificate_that_nobody_signed_is_named(tmp_path):
    ssl = pytest.importorskip("ssl")
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -keyout {tmp_path}/key -out {tmp_path}/cert -days 2 -subj /CN=localhost"
    if os.system(f"{command} 2>/dev/null"):
        pytest.skip("openssl is not installed")
    with served(tmp_path) as (address, handler):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
        handler.rbufsize = -1
        original = handler.setup

        def setup(self):
            self.request = context.wrap_socket(self.request, server_side=True)
            original(self)

        handler.setup = setup
        with pytest.raises(UserError, match="its certificate is not accepted"):
            load_index(f"{address.replace('http:', 'https:')}/x.tar")


def test_a_server_without_ranges_is_refused_or_its_shards_are_kept_whole(tmp_path):
    near = next(iter(data_of(world(tmp_path), batch_size=11, window=2).train_dataloader()))
    with scripted(tmp_path / "w") as (address, handler):
        handler.ranges = False
        with pytest.raises(UserError, match=r"answers 200 in place of 206\); data\.cache=FOLDER"):
            next(iter(far(address).train_dataloader()))
        kept = next(iter(far(address, cache=str(tmp_path / "cache")).train_dataloader()))
    assert kept.keys == near.keys and stacked(kept.images).equal(stacked(near.images))


def replaced(folder, number: int):
    """The first shard with another image at the same place, and its index."""
    write_tar(folder / "part-000.tar", {f"s{n:04d}": sample(n if n else number) for n in range(5)})
    (folder / "part-000.tar.index.json").unlink()
    data_of(folder).check()


@pytest.mark.parametrize("named", [{"ETag": '"{}"'}, {"Last_Modified": "Mon, 0{} Jan 2024 00:00:00 GMT"}, {}])
def test_a_shard_that_changed_upstream_is_fetched_again(tmp_path, named):
    folder = world(tmp_path)
    with scripted(folder, **{key: value.format(1) for key, value in named.items()}) as (address, handler):
        cache = ShardCache(tmp_path / "cache", 1e-3)
        index = load_index(f"{address}/part-000.tar")
        assert cache.read(index.path, 0, 10**5, index.tag, index.sha256) == (folder / "part-000.tar").read_bytes()
        replaced(folder, 7)
        handler.named = {key.replace("_", "-"): value.format(2) for key, value in named.items()}
        index = load_index(f"{address}/part-000.tar")
        assert cache.read(index.path, 0, 10**5, index.tag, index.sha256) == (folder / "part-000.tar").read_bytes()


def test_an_index_of_our_own_is_of_the_version_that_the_server_names(tmp_path):
    write_tar(tmp_path / "w/x.tar", {"old": sample(1)})
    with scripted(tmp_path / "w", ETag='"1"') as (address, handler):
        assert load_index(f"{address}/x.tar").keys() == ["old"]
        write_tar(tmp_path / "w/x.tar", {"new": sample(2)})
        handler.named = {"ETag": '"2"'}
        assert load_index(f"{address}/x.tar").keys() == ["new"]


def test_a_shard_that_changes_while_it_is_read_stops_the_run(tmp_path):
    world(tmp_path)
    with scripted(tmp_path / "w", ETag='"1"') as (address, handler):
        loader = iter(far(address).train_dataloader())
        handler.named = {"ETag": '"2"'}
        with pytest.raises(UserError, match=r"part-00.\.tar: the file changed while it is in use"):
            next(loader)


def test_a_cached_shard_is_of_the_content_that_its_index_names(tmp_path):
    folder = world(tmp_path)
    content = (folder / "part-000.tar").read_bytes()
    (folder / "part-000.tar").write_bytes(content.replace(b"Which?", b"Where?"))  # and its index stays
    message = r"part-000\.tar: its content is not what its index was made for"
    with scripted(folder) as (address, _), pytest.raises(UserError, match=message):
        next(iter(far(address, cache=str(tmp_path / "cache")).train_dataloader()))
    assert len(list((tmp_path / "cache").glob("*.tar"))) <= 1  # the other one


def test_shards_of_one_name_from_two_servers_share_a_cache(tmp_path):
    for number, name in enumerate(("one", "two")):
        write_tar(tmp_path / name / "x.tar", {"k": sample(number)})
        data_of(tmp_path / name).check()
    cache = ShardCache(tmp_path / "cache", 1e-3)
    with scripted(tmp_path / "one", ETag='"1"') as (one, _), scripted(tmp_path / "two", ETag='"1"') as (two, _):
        for address, name in ((one, "one"), (two, "two"), (one, "one")):
            index = load_index(f"{address}/x.tar")
            assert cache.read(index.path, 0, 10**5, index.tag, index.sha256) == (tmp_path / name / "x.tar").read_bytes()


def test_a_streamed_shard_survives_faults(tmp_path, monkeypatch):
    world(tmp_path)
    with scripted(tmp_path / "w", 503, "short", "reset") as (address, _):
        shards = [f"{address}/part-00{n}.tar" for n in (0, 1)]
        data = StreamData({"a": ShardSource(shards)}, batch_size=11, image_size=8)
        assert len(set(next(iter(data.train_dataloader())).keys)) == 11 and not data.ledger.skips


def test_an_address_is_shown_without_what_may_be_secret():
    assert shown("https://me:pass@host:8/a/x.tar?token=1#f") == "https://host:8/a/x.tar?…"
    assert shown("/data/x.tar") == "/data/x.tar"


def test_the_name_of_a_sample_holds_no_secret(tmp_path):
    world(tmp_path)
    with scripted(tmp_path / "w") as (address, _):
        place = f"{address.replace('http://', 'http://me:secret@')}/part-000.tar"
        assert expand(place) == [place]
        data = ShardData(train={"a": ShardSource(place)}, batch_size=5, image_size=8)
        assert not any("secret" in key for key in next(iter(data.train_dataloader())).keys)
