import json
import tarfile

import pytest
from test_shards import add, data_of, fit, png, sample, write_tar

from data_pipelines.shards.data import ShardSource
from data_pipelines.shards.ledger import Ledger, Skip
from umm_zoo.errors import UserError


def turns(*pairs) -> bytes:
    return json.dumps({"conversations": [{"role": role, "text": text} for role, text in pairs]}).encode()


BAD = {
    "truncated": (sample(0, **{"0.png": png(0, 64)[:60]}), "image cannot be decoded"),
    "empty": (sample(0, **{"0.png": b""}), "image of 0 bytes"),
    "html": (sample(0, **{"0.png": b"<html>"}), "not an image: a web page, expected the file itself"),
    "latin1": (sample(0, json=b'{"conversations": "\xe9"}'), "not UTF-8"),
    "broken": (sample(0, json=b"{"), "json cannot be parsed"),
    "listed": (sample(0, json=b"[]"), "json holds a list"),
    "mute": (sample(0, json=b"{}"), "no 'conversations'"),
    "odd": (sample(0, json=turns(("robot", "<image>"))), "role 'robot'"),
    "number": (sample(0, json=turns(("user", 5))), "text of a turn is a int"),
    "marker": (sample(0, json=turns(("user", "no marker"))), "0 <image> markers in the user's turns, 1 images"),
    "answered": (sample(0, json=turns(("user", "a?"), ("assistant", "<image>"))), "0 <image> markers in the user's turns"),
    "system": (sample(0, json=turns(("system", "<image>"), ("user", "<image>"))), "<image> in a system turn"),
    "long": (sample(0, json=turns(("user", "<image>" + "x" * 100_000))), "text of 1000"),
    "gap": ({"json": sample(0)["json"], "1.png": png(1)}, r"numbered [1], not from 0 on"),
    "alone": ({"0.png": png(1)}, "member 'json' is missing (found 0.png)"),
}


def damaged(folder):
    """20 good samples and all the bad ones, in two shards."""
    good = {f"good{n:02d}": sample(n) for n in range(20)}
    write_tar(folder / "a.tar", {**dict(list(good.items())[:8]), **{key: members for key, (members, _) in BAD.items()}})
    write_tar(folder / "b.tar", dict(list(good.items())[8:]))
    return folder


def test_one_bad_sample_of_each_kind_kills_nothing_and_is_named(tmp_path):
    total = 20 + len(BAD)
    data = data_of(damaged(tmp_path / "world"), batch_size=total)
    model = fit(data, tmp_path / "run", 1)
    seen = sorted(key.split(":")[1] for key in model.seen)
    assert seen == [f"good{n:02d}" for n in range(20)]  # smaller by the bad, no stand-ins
    source = json.loads((tmp_path / "run/data.json").read_text())["train"]["a"]
    counts = [source[name] for name in ("samples", "drawn", "read", "skipped", "repeated")]
    assert counts == [total, total, 20, len(BAD), 0]
    assert {skip["key"]: skip["shard"] for skip in source["skips"]} == {key: str(tmp_path / "world/a.tar") for key in BAD}
    for skip in source["skips"]:
        assert BAD[skip["key"]][1] in skip["reason"]


def test_too_many_bad_samples_stop_the_run_with_their_list(tmp_path):
    data = data_of(damaged(tmp_path / "world"), batch_size=20 + len(BAD), max_skips=3)
    with pytest.raises(UserError, match=r"max_skips: found 4 bad samples, expected 3 .*data\.json\); a/a\.tar:") as caught:
        fit(data, tmp_path / "run", 1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_a_micro_batch_without_one_good_sample_repeats_another_and_says_so(tmp_path, workers):
    write_tar(tmp_path / "w/a.tar", {"bad": BAD["empty"][0], "good": sample(7)})
    model = fit(data_of(tmp_path / "w", batch_size=1, num_workers=workers, window=0), tmp_path / "run", 4)
    assert [key.split(":")[1] for key in model.seen] == ["good"] * 4
    source = json.loads((tmp_path / "run/data.json").read_text())["train"]["a"]
    assert (source["drawn"], source["skipped"], source["substituted"], source["repeated"]) == (4, 2, 2, 2)
    assert {skip["substitute"] for skip in source["skips"]} == {"a/a.tar:good"}


def test_nothing_but_bad_samples_stop_the_run(tmp_path):
    write_tar(tmp_path / "w/a.tar", {f"bad{n}": BAD["empty"][0] for n in range(3)})
    with pytest.raises(ValueError, match=r"samples in a row that are bad, from 'bad0' on"):
        fit(data_of(tmp_path / "w", batch_size=1, window=0), tmp_path / "run", 4)


@pytest.mark.processes
def test_the_ledger_of_a_resumed_run_is_that_of_a_straight_one(tmp_path):
    world = damaged(tmp_path / "world")
    fit(data_of(world), tmp_path / "straight", 9)
    fit(data_of(world), tmp_path / "run", 6)
    fit(data_of(world, num_workers=1), tmp_path / "run", 9, tmp_path / "run/at-step=4.ckpt")  # two steps are lost and done again
    assert json.loads((tmp_path / "run/data.json").read_text()) == json.loads((tmp_path / "straight/data.json").read_text())


def test_a_fresh_run_in_an_old_folder_starts_a_fresh_ledger(tmp_path):
    fit(data_of(damaged(tmp_path / "world"), batch_size=20 + len(BAD)), tmp_path / "run", 1)
    write_tar(tmp_path / "clean/a.tar", {"good": sample(1)})
    fit(data_of(tmp_path / "clean", batch_size=1), tmp_path / "run", 1)
    assert json.loads((tmp_path / "run/data.json").read_text())["train"]["a"]["skips"] == []


def test_validation_skips_are_named_and_counted_once(tmp_path):
    world = damaged(tmp_path / "world")
    data = data_of(world, val={"v": ShardSource(str(world))}, val_batch_size=5, batch_size=4)
    model = fit(data, tmp_path / "run", 2, val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert len(model.validated) == 40
    assert json.loads((tmp_path / "run/data.json").read_text())["val"]["v"]["skipped"] == len(BAD)


def test_duplicate_keys_are_read_once(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in (3, 4):
            for name, content in sample(number).items():
                add(tar, f"same.{name}", content)
    batch = next(iter(data_of(tmp_path / "a.tar", batch_size=1).train_dataloader()))
    assert batch.answers() == ["3"] and data_of(tmp_path / "a.tar").stream.num_samples == 1


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_a_shard_replaced_during_the_run_stops_it_and_the_error_of_a_worker_arrives_whole(tmp_path, workers):
    write_tar(tmp_path / "a.tar", {f"k{n}": sample(n) for n in range(40)})
    loader = iter(data_of(tmp_path / "a.tar", batch_size=2, num_workers=workers).train_dataloader())
    next(loader)
    (tmp_path / "a.tar").write_bytes(bytes((tmp_path / "a.tar").stat().st_size))
    with pytest.raises(UserError) as caught:
        [next(loader) for _ in range(9)]
    [problem] = caught.value.problems
    assert problem.where == f"data: {tmp_path}/a.tar" and problem.found.startswith("the tar holds no member 'k")
    assert problem.hint == f"`python -m data_pipelines.index {tmp_path}/a.tar` makes a new index"


def test_ranks_write_their_own_files_and_rank_zero_puts_them_together(tmp_path):
    ledgers = [Ledger(9, rank) for rank in (0, 1)]
    for rank, ledger in enumerate(ledgers):
        ledger.open(tmp_path)
        assert ledger.add(Skip("train", "a", "x.tar", f"key{rank}", "broken", 5 - rank))
        assert not ledger.add(Skip("train", "a", "x.tar", f"key{rank}", "broken", 5 - rank))
    (tmp_path / "data.skips.1.jsonl").open("a").write('{"stage": "tr')  # killed while writing
    ledgers[1].write(99, {"a": (9, 9)}, {})
    assert not (tmp_path / "data.json").exists()
    ledgers[0].write(99, {"a": (9, 9)}, {})
    assert [skip["key"] for skip in json.loads((tmp_path / "data.json").read_text())["train"]["a"]["skips"]] == ["key1", "key0"]
