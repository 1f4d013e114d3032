import multiprocessing
import os
import time

import pytest
from test_archive import served
from test_shards import data_of, write_world

from data_pipelines.shards.addresses import filesystem
from data_pipelines.shards.cache import ShardCache, _locked
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.expanding import expand
from umm_zoo.batch import stacked

fsspec = pytest.importorskip("fsspec")
from fsspec.implementations.dirfs import DirFileSystem  # noqa: E402
from fsspec.registry import _registry, register_implementation  # noqa: E402 - the name in fsspec itself is a read-only view


@pytest.fixture
def remote(tmp_path):
    """Four shards behind ``s3://``, served by a stand-in that counts the bytes it hands out; and their folder."""
    world = write_world(tmp_path / "bucket", [5, 6, 4, 7])
    data_of(world).check()  # writes the indexes
    real = dict(_registry)

    class Bucket(DirFileSystem):
        protocol, cachable, served = "s3", False, []

        def __init__(self, **options):
            super().__init__(str(tmp_path), fsspec.filesystem("file"))

        @classmethod
        def _strip_protocol(cls, path):
            return path.removeprefix("s3://")

        def unstrip_protocol(self, name):
            return f"s3://{name}"

        def cat_file(self, path, start=None, end=None, **options):
            content = super().cat_file(path, start, end)
            self.served.append((path, len(content)))
            return content

        def get_file(self, path, local, **options):
            self.served.append((path, self.size(path)))
            return super().get_file(path, local)

    register_implementation("s3", Bucket, clobber=True)
    yield Bucket, world
    _registry.clear()
    _registry.update(real)


def remote_data(tmp_path, **options) -> ShardData:
    return ShardData(train={"a": ShardSource("s3://bucket/part-*.tar")}, batch_size=11, window=2, image_size=8, **options)


def test_a_bucket_gives_the_batches_of_the_folder(tmp_path, remote):
    bucket, world = remote
    far, near = iter(remote_data(tmp_path).train_dataloader()), iter(data_of(world, batch_size=11).train_dataloader())
    for _ in range(4):
        a, b = next(far), next(near)
        assert a.keys == b.keys and stacked(a.images).equal(stacked(b.images))
    read = sum(size for path, size in bucket.served if path.endswith(".tar"))
    assert 0 < read < sum(path.stat().st_size for path in world.glob("*.tar")) * 2  # ranges, not shards


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_the_second_epoch_reads_nothing_from_afar(tmp_path, remote, workers):
    bucket, world = remote
    data = remote_data(tmp_path, cache=str(tmp_path / "cache"), cache_gb=1e-3, num_workers=workers)
    loader, near = iter(data.train_dataloader()), iter(data_of(world, batch_size=11).train_dataloader())
    for _ in range(2):
        assert stacked(next(loader).images).equal(stacked(next(near).images))
    if workers:  # read ahead for a moment: the workers may not be through with the first epoch
        [next(loader) for _ in range(2)]
    bucket.served.clear()
    (tmp_path / "bucket").rename(tmp_path / "gone")  # and could not
    keys = [key for _ in range(2) for key in next(loader).keys]
    assert len(set(keys)) == 22 and not bucket.served


def held(cache: ShardCache) -> int:
    with _locked(cache.folder / ".lock"):  # or a shard could be met under both its names, while it is renamed
        return sum(size for _, size, _ in cache._files())


def test_the_cache_stays_below_its_bound_and_keeps_what_was_used_last(tmp_path, remote):
    bucket, world = remote
    shards = expand("s3://bucket/part-*.tar")
    sizes = [os.path.getsize(path) for path in sorted(world.glob("*.tar"))]
    cache = ShardCache(tmp_path / "cache", (sum(sizes[:3]) + 10) / 1e9)
    for shard in (0, 1, 2, 0, 3, 0, 1):
        assert cache.read(shards[shard], 512, 2) == (world / f"part-{shard:03d}.tar").read_bytes()[512:514]
        assert held(cache) <= cache.bound
        time.sleep(0.01)
    fetched = [path for path, _ in bucket.served]
    assert fetched == [f"s3://bucket/part-00{n}.tar" for n in (0, 1, 2, 3, 1)]  # 0 was used again and stayed


def test_a_shard_larger_than_the_cache_is_read_by_ranges(tmp_path, remote, caplog):
    _, world = remote
    data = remote_data(tmp_path, cache=str(tmp_path / "cache"), cache_gb=1e-6)
    loader, near = iter(data.train_dataloader()), iter(data_of(world, batch_size=11).train_dataloader())
    for _ in range(2):
        assert stacked(next(loader).images).equal(stacked(next(near).images))
    assert not list((tmp_path / "cache").glob("*.tar")) and len(caplog.messages) == 4 and "cache_gb" in caplog.text


def _reads(folder: str, bound: float, address: str, seed: int, out) -> None:
    import random

    cache, picks = ShardCache(folder, bound), random.Random(seed)
    most = right = 0
    for _ in range(40):
        shard = picks.randrange(4)
        content = cache.read(address.format(shard), 512, 20)
        right += content is None or content == filesystem(address.format(shard)).cat_file(address.format(shard), 512, 532)
        most = max(most, held(cache))
    out.put((most, right))


@pytest.mark.processes
def test_several_processes_share_a_small_cache(tmp_path):
    world = write_world(tmp_path / "w", [5, 5, 5, 5])
    size = os.path.getsize(world / "part-000.tar")
    with served(world) as (address, _):
        context = multiprocessing.get_context("fork")
        out, address = context.Queue(), f"{address}/part-00{{}}.tar"
        bound = 2.5 * size / 1e9
        readers = [context.Process(target=_reads, args=(str(tmp_path / "c"), bound, address, seed, out)) for seed in range(3)]
        [reader.start() for reader in readers]
        results = [out.get(timeout=60) for _ in readers]
        [reader.join() for reader in readers]
    assert all(0 < most <= 2.5 * size for most, _ in results) and [right for _, right in results] == [40] * 3
    assert not list((tmp_path / "c").glob("*.partial"))


def test_what_a_crash_left_takes_no_room(tmp_path, remote):
    _, world = remote
    size = os.path.getsize(world / "part-000.tar")
    cache = ShardCache(tmp_path / "cache", 1.2 * size / 1e9)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"{'0' * 32}.{size}.partial").touch()
    assert cache.read("s3://bucket/part-000.tar", 0, 4) is not None and held(cache) <= cache.bound


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gs")])
def test_a_missing_extra_is_named_in_one_line(scheme, extra, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **named):
        if name.split(".")[0] in ("s3fs", "gcsfs"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(_registry, scheme, raising=False)
    with pytest.raises(ValueError, match=rf"^{scheme}://b/x\.tar: .*not installed; pip install 'umm_zoo\[{extra}\]'$"):
        expand(f"{scheme}://b/x.tar")


KIND = r"found an address of the kind .*, expected files and http, https, s3, gs$"
STRANGE = [(where, KIND) for where in ("ftp://a/x.tar", "simplecache::s3://a/x.tar", "https://a/x.tar::zip://b", "foo://x.tar")]
COMMANDS = [(where, "never run") for where in ("pipe:cat x.tar", "|cat x.tar", "!cat x.tar", "pipe:curl s3://a/b")]


@pytest.mark.parametrize(("address", "message"), STRANGE + COMMANDS)
def test_other_kinds_of_addresses_and_commands_are_refused(address, message):
    with pytest.raises(ValueError, match=message) as caught:
        expand(address)
    assert "\n" not in str(caught.value)


def test_memory_addresses_are_read(tmp_path):
    world = write_world(tmp_path, [3])
    data_of(world).check()
    files = fsspec.filesystem("memory")
    for path in world.iterdir():
        files.pipe(f"/w/{path.name}", path.read_bytes())
    data = ShardData(train={"a": ShardSource("memory://w/*.tar")}, batch_size=3, image_size=8)
    assert len(next(iter(data.train_dataloader())).keys) == 3
    files.rm("/w", recursive=True)


def test_tars_of_others_in_the_folder_are_left_alone(tmp_path):
    for name in ("photos.tar", "notes.partial"):
        (tmp_path / name).write_bytes(b"x" * 100)
    cache = ShardCache(tmp_path, 50e-9)
    assert not cache._reserve(tmp_path / f"{'0' * 32}.60.partial", 60) and cache._reserve(tmp_path / f"{'0' * 32}.40.partial", 40)
    assert (tmp_path / "photos.tar").is_file() and (tmp_path / "notes.partial").is_file()
