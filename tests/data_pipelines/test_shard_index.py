import tarfile
from functools import lru_cache

import pytest
from test_shards import data_of, write_tar, write_world

from data_pipelines.shards import index
from data_pipelines.shards.index import load_index
from data_pipelines.shards.indexing import build_index
from umm_zoo.errors import UserError

ROWS = {"a": {"json": b"{}", "0.png": b"p" * 900}, "dir/b": {"txt": b""}, "é": {"0.png": b"q", "json": b"[]"}}


def test_the_index_says_what_the_tar_holds(tmp_path):
    write_tar(tmp_path / "a.tar", ROWS)
    with tarfile.open(tmp_path / "a.tar") as tar:
        listed = {member.name: (member.offset_data, member.size) for member in tar}
    index = load_index(str(tmp_path / "a.tar"))
    found = {f"{key}.{name}": place for n, key in enumerate(index.keys()) for name, *place in index.members(n)}
    assert {name: tuple(place) for name, place in found.items()} == listed
    assert [index.key(n) for n in range(3)] == index.keys() == list(ROWS)
    assert index.names(1) == ["txt"] and (len(index), index.num_samples) == (3, 3)


def test_opening_reads_heads_alone_and_few_shards_are_kept(tmp_path, monkeypatch):
    few = lru_cache(2)(index._kept_columns.__wrapped__)
    monkeypatch.setattr(index, "_kept_columns", few)
    data = data_of(write_world(tmp_path, [3, 4, 2, 5]), window=1, batch_size=4)
    data.check()
    assert not few.cache_info().currsize
    loader = iter(data.train_dataloader())
    keys = [key for _ in range(7) for key in next(loader).keys]
    assert len(set(keys[:14])) == 14 and set(keys[14:]) <= set(keys[:14]) and few.cache_info().currsize == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "cannot be read"),
        (lambda text: "nonsense", "cannot be read"),
        (lambda text: text.replace('"version":3', '"version":9'), "index version 9, expected 2 or 3"),
        (lambda text: text.replace('"offsets":[', '"offsets":[7,'), "cannot be read"),
        (lambda text: text.replace('"keys"', '"ke"'), "cannot be read"),
    ],
)
def test_a_damaged_index_is_one_line_that_says_how_to_mend_it(tmp_path, change, message):
    write_tar(tmp_path / "a.tar", ROWS)
    place = tmp_path / "a.tar.index.json"
    build_index(str(tmp_path / "a.tar"))
    place.write_text(change(place.read_text()))
    index._kept_columns.cache_clear()
    with pytest.raises(UserError, match=message + r".*data_pipelines\.index") as caught:
        load_index(str(tmp_path / "a.tar")).members(0)
    assert "\n" not in str(caught.value)


def test_numbers_take_no_more_bytes_than_they_need(tmp_path):
    write_tar(tmp_path / "a.tar", {f"k{n:05d}": {"json": b"{}", "png": b""} for n in range(2000)})
    columns = load_index(str(tmp_path / "a.tar"))._places()
    held = sum(array.nbytes for array in (columns.key_ends, columns.starts, columns.offsets, columns.sizes)) + len(columns.keys)
    assert held / 2000 < 22  # key 6, end and start 2 each, two offsets of 4, two sizes of 1
