"""An index is checked against itself when it is read, and against the tar's headers when a sample is."""

import json
import tracemalloc

import pytest
from test_shards import data_of, sample, write_tar

from data_pipelines.shards import index
from umm_zoo.errors import UserError


def exchanged(values, one, other):
    values[one], values[other] = values[other], values[one]
    return values


def other_index(tmp_path):
    write_tar(tmp_path / "other/a.tar", {f"m{n}": sample(n) for n in range(8)})
    data_of(tmp_path / "other").check()
    return json.loads((tmp_path / "other/a.tar.index.json").read_text())


LIES = {
    "offsets exchanged between samples": lambda c: c | {"offsets": exchanged(c["offsets"], 0, 2)},
    "members exchanged within a sample": lambda c: c | {n: exchanged(c[n], 0, 1) for n in ("offsets", "sizes")},
    "keys exchanged": lambda c: c | {"keys": exchanged(c["keys"], 0, 1)},
    "names exchanged": lambda c: c | {"layouts": [["0.png", "json"]]},
    "all at one offset": lambda c: c | {"offsets": [c["offsets"][0]] * len(c["offsets"])},
    "sizes of 0": lambda c: c | {"sizes": [0] * len(c["sizes"])},
    "sizes too large": lambda c: c | {"sizes": [2**40] * len(c["sizes"])},
    "an offset below 0": lambda c: c | {"offsets": [-512, *c["offsets"][1:]]},
    "an offset in between": lambda c: c | {"offsets": [c["offsets"][0] + 0.5, *c["offsets"][1:]]},
    "an offset of 100 bits": lambda c: c | {"offsets": [2**100, *c["offsets"][1:]]},
    "offsets as text": lambda c: c | {"offsets": [str(n) for n in c["offsets"]]},
    "a layout below 0": lambda c: c | {"layout": -1},
    "a layout that is none": lambda c: c | {"layout": [5] * 8},
    "keys that are numbers": lambda c: c | {"keys": list(range(8))},
    "one key for all": lambda c: c | {"keys": ["k0"] * 8},
    "no digest": lambda c: c | {"sha256": ""},
    "another kind of refusals": lambda c: c | {"refused": [1]},
    "a list": lambda c: [c],
    "null": lambda c: None,
    **{f"{n} samples": lambda c, n=n: c | {"counts": {"samples": n}} for n in (5, 12, 10**9, -4, 3.5, True, "8", None)},
}


@pytest.mark.parametrize("lie", [*LIES, "another tar's"])
def test_an_index_that_lies_is_one_line_and_no_gigabytes(tmp_path, lie):
    write_tar(tmp_path / "a.tar", {f"k{n}": sample(n) for n in range(8)})
    data_of(tmp_path / "a.tar").check()
    place = tmp_path / "a.tar.index.json"
    content = json.loads(place.read_text())
    place.write_text(json.dumps(LIES[lie](content) if lie in LIES else other_index(tmp_path), separators=(",", ":")))
    index._kept_columns.cache_clear()
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.tar.*: .*data_pipelines\.index .*a\.tar` makes a new index") as caught:
        next(iter(data_of(tmp_path / "a.tar", batch_size=8).train_dataloader()))
    assert tracemalloc.get_traced_memory()[1] < 1e8 and "\n" not in str(caught.value)
    tracemalloc.stop()
