"""Shards are bytes from strangers: reading them runs nothing, writes nothing and leaves their folder alone."""

import io
import json
import os
import pickle
import tarfile

import pytest
from test_shards import add, data_of, png, write_tar

from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.shards.index import _kept_columns, load_index
from data_pipelines.shards.streaming import StreamData
from data_pipelines.tasks import TextToImage


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self):
        return os.mkdir, (self.place,)


def sample() -> dict[str, bytes]:
    turns = [{"role": "user", "text": "<image>\nWhich?"}, {"role": "assistant", "text": "this"}]
    return {"json": json.dumps({"conversations": turns}).encode(), "0.png": png(3)}


@pytest.mark.parametrize("module", [ShardData, StreamData])
@pytest.mark.parametrize("name", ["pickle", "pkl", "pyd", "pth", "pt", "npy"])
def test_nothing_in_a_shard_is_unpickled(tmp_path, module, name):
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    write_tar(tmp_path / "a.tar", {f"k{n}": {**sample(), name: bomb, f"extra.{name}": bomb} for n in range(2)})
    data = module({"a": ShardSource(str(tmp_path / "a.tar"))}, batch_size=2, image_size=8)
    assert len(next(iter(data.train_dataloader()))) == 2 and not (tmp_path / "boom").exists()


def test_an_array_that_is_a_pickle_is_a_bad_sample(tmp_path):
    bomb = pickle.dumps(Bomb(str(tmp_path / "boom")))
    good = {"txt": b"a", "jpg": png(1), "latents.npy": _npy()}
    write_tar(tmp_path / "a.tar", {"bad": {**good, "latents.npy": bomb}, "good": good})
    source = ShardSource(str(tmp_path / "a.tar"), TextToImage(extras=["latents"]))
    batch = next(iter(ShardData({"a": source}, batch_size=2, image_size=8).train_dataloader()))
    assert batch.keys == ["a/a.tar:good"] and not (tmp_path / "boom").exists()


def _npy() -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, np.zeros(3, dtype=np.float32))
    return file.getvalue()


@pytest.mark.parametrize("module", [ShardData, StreamData])
def test_names_that_climb_out_stay_names_and_links_are_no_samples(tmp_path, module):
    (tmp_path / "secret.json").write_text(sample()["json"].decode())
    folder = tmp_path / "deep" / "shards"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key in ("../../climbed", str(tmp_path / "absolute")):
            for name, content in sample().items():
                add(tar, f"{key}.{name}", content)
        for kind, key in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard")):
            link = tarfile.TarInfo(f"{key}.json")
            link.type, link.linkname = kind, str(tmp_path / "secret.json")
            tar.addfile(link)
        device = tarfile.TarInfo("device.json")
        device.type = tarfile.CHRTYPE
        tar.addfile(device)
    before = sorted(path for path in tmp_path.rglob("*"))
    data = module({"a": ShardSource(str(folder))}, batch_size=2, image_size=8)
    batch = next(iter(data.train_dataloader()))
    assert sorted(key.split("climbed")[-1].split("absolute")[-1] for key in batch.keys) == ["", ""]
    after = sorted(path for path in tmp_path.rglob("*") if not path.name.endswith(".index.json"))
    assert after == before
    if module is ShardData:
        assert len(load_index(str(folder / "a.tar"))) == 2


def test_an_index_cannot_point_outside_of_its_tar(tmp_path):
    write_tar(tmp_path / "a.tar", {"k": sample()})
    data_of(tmp_path).check()
    place = tmp_path / "a.tar.index.json"
    content = json.loads(place.read_text())
    content["offsets"] = [10**9 + offset for offset in content["offsets"]]
    place.write_text(json.dumps(content))
    _kept_columns.cache_clear()
    with pytest.raises(ValueError, match=r"a\.tar\.index\.json: this index cannot be read .*data_pipelines\.index"):
        next(iter(data_of(tmp_path, batch_size=1).train_dataloader()))
