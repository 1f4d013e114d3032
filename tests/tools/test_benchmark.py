"""Every arm of every benchmark runs at its smallest size; arms that are to do the same do it."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tools import benchmark as tool
from tools.benchmarks import base, bridge, fit, lengths, loader, report, rollout, saves, turns, windows
from tools.benchmarks.rollout_peers import trl_trainer
from umm_zoo.backbones.tokenizer import load_tokenizer
from umm_zoo.batch import stacked

ARMS = [(name, *case) for name in tool.NAMES if name not in ("fit", "saves") for case in tool.benchmark(name).cases(
    tool.options_of(name, {}, tool.parser().parse_args(["--smallest"]))
)]  # fmt: skip


def smallest(name: str, folder: Path, *words: str) -> Namespace:
    given = tool.parser().parse_args(["--smallest"])
    return Namespace(**{**vars(tool.options_of(name, tool.chosen([name, *words])[1], given)), "folder": str(folder)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.mark.parametrize(("name", "setting", "arm"), ARMS)
def test_an_arm_runs(name: str, setting: str, arm: str, folder: Path) -> None:
    options = smallest(name, folder)
    if reason := tool.benchmark(name).missing(options, arm):
        pytest.skip(reason)
    found = tool.benchmark(name).measure(options, setting, arm)
    assert found["seconds"] > 0 and all(math.isfinite(value) for value in found.values())


@pytest.mark.processes
def test_a_checkpoint_of_shared_out_weights_is_timed(folder: Path) -> None:
    found = saves.measure(smallest("saves", folder), "two ranks, sharded", "background")
    assert found["seconds"] > 0 and math.isfinite(found["memory"])


def test_own_arms_are_the_first_of_a_setting() -> None:
    for name in tool.NAMES:
        cases = tool.benchmark(name).cases(smallest(name, Path()))
        firsts = [next(arm for own, arm in cases if own == setting) for setting in dict.fromkeys(own for own, _ in cases)]
        assert set(firsts) <= set(tool.benchmark(name).OWN)


# -- arms that do the same -------------------------------------------------------------------------------------------------


def test_naive_and_ours_have_the_same_loss(folder: Path) -> None:
    options, losses = smallest("bridge", folder), []
    for arm in ("naive", "ours"):
        method = bridge.build(options)
        torch.manual_seed(1)
        losses.append(bridge.loss_of(method, bridge.request(options, 24), arm).item())
    assert abs(losses[0] - losses[1]) < 1e-4


def test_all_loaders_end_in_the_same_images(folder: Path) -> None:
    paths = loader.make_shards(folder / "same", samples=12, edges=[40], shards=3)
    found = [next(loader.LOADERS[name](paths, 32, 12, 0)) for name in ("ours", "webdataset", "folder")]
    sums = [sorted(images.flatten(1).long().sum(1).tolist()) for images in found]
    assert sums[0] == sums[1] == sums[2] and found[0].shape == (12, 32, 32, 3)


def test_buckets_of_unequal_images_hold_the_same_pixels_whoever_loads(folder: Path) -> None:
    paths = loader.make_shards(folder / "unequal", samples=24, edges=[30, 60], shards=2)
    streams = [loader.LOADERS[name](paths, 32, 6, 0, buckets=True) for name in ("ours", "webdataset")]
    mine, theirs = (torch.cat([next(batches).flatten() for _ in range(4)]) for batches in streams)
    assert mine.sort().values.equal(theirs.sort().values) and 24 * 0.8 * 32 * 32 * 3 < len(mine) <= 24 * 32 * 32 * 3


@pytest.mark.parametrize("equal", [True, False])
def test_both_towers_make_the_same_tokens(equal: bool, folder: Path) -> None:
    options = smallest("windows", folder)
    vlm, images = base.small_qwen(32, 1, 2, 1, 16, 2), windows.photographs(options, equal)
    torch.testing.assert_close(*(windows.tokens(vlm, images, arm) for arm in ("ours", "library")))


@pytest.mark.parametrize("spread", ["log", "even"])
def test_answers_have_all_lengths_up_to_the_longest(spread: str) -> None:
    texts = [row["json"]["conversations"][1]["text"] for row in lengths.rows(40, 20, spread, seed=0)]
    found = sorted(len(load_tokenizer()(" " + text)["input_ids"]) for text in texts)
    assert found[0] == 1 and found[-1] == 20 and (found[20] < 7) == (spread == "log")


def test_no_caption_ends_early_and_half_of_the_peaked_are_one(folder: Path) -> None:
    options = smallest("rollout", folder)
    for setting in ("varied", "peaked"):
        head = rollout.build(options, "ours", setting).vlm.model.lm_head
        chances = head(torch.zeros(1, 32)).softmax(-1)[0]
        assert torch.equal(chances == 0, head.bias < 0) and (head.bias < 0).any()
    assert chances.max().item() ** options.tokens == pytest.approx(0.5, abs=0.05)


def test_trl_asks_scores_and_trains_what_ours_does(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    options = smallest("rollout", tmp_path)
    batch, method, ours = (rollout.random_images(options), *(rollout.build(options, arm, "varied") for arm in ("trl", "ours")))
    trainer = trl_trainer(options, method, batch, str(tmp_path))
    trained = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (trainer.model, ours)]
    assert trained[0] == trained[1] > 0

    own = method.vlm.embed(method.captions.conversations(2), batch.images, [1, 1], for_generation=True)
    rows = list(trainer.train_dataset)
    contents = [[{"type": "image", "image": row["image"]}, {"type": "text", "text": row["prompt"][0]["content"]}] for row in rows]
    prompts, _, fields = trainer._tokenize_prompts([[{"role": "user", "content": content}] for content in contents])
    assert prompts == own.token_ids.tolist()
    fields = {name: torch.as_tensor(value) for name, value in fields.items()}
    torch.testing.assert_close(fields["pixel_values"], method.vlm.layout.patches(stacked(batch.images)), rtol=0, atol=1e-5)

    tokens = torch.randint(100, 1000, (2, 4))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    whole = torch.cat([own.token_ids, tokens], 1)
    fields["mm_token_type_ids"] = torch.cat([fields["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    scored, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model, whole, torch.ones_like(whole), 4, num_images=[1, 1], **fields
    )
    torch.testing.assert_close(scored, method.log_probs(own, tokens, mask, torch.arange(2)), rtol=0, atol=1e-4)


# -- fit, on a method and data of a few numbers ----------------------------------------------------------------------------

TOY = """
import torch
from lightning import LightningDataModule
from torch import nn
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs

class Line(Method):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def parts(self) -> dict[str, nn.Module]:
        return {"layer": self.layer}

    def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(batch.extras["x"]).square().mean()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        return Outputs(self.training_losses(batch))

class Numbers(LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        while True:
            yield Batch(keys=["a"], conversations=[[]], extras={"x": torch.randn(1, 3, generator=generator)})
"""


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "benchmark_toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    tree: dict[str, Any] = {"method": {"_target_": "benchmark_toy.Line"}, "data": {"_target_": "benchmark_toy.Numbers"}}
    tree["training"] = {"trained": ["layer"], "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.1}}
    tree["trainer"] = {"accelerator": "cpu", "gradient_clip_val": 0.1, "enable_progress_bar": False}
    Path("toy.yaml").write_text(yaml.safe_dump(tree))
    return "toy.yaml"


def test_fit_and_the_bare_loop_take_the_same_steps(experiment: str, tmp_path: Path) -> None:
    options = smallest("fit", tmp_path, f"experiment={experiment}", "steps=6")
    mine, bare = (fit.measure(options, experiment, arm) for arm in ("fit", "bare"))
    assert mine["loss"] == pytest.approx(bare["loss"], abs=1e-6) and mine["seconds"] > 0 < bare["seconds"]


def test_what_the_bare_loop_cannot_do_is_refused(experiment: str, tmp_path: Path) -> None:
    options = smallest("fit", tmp_path, f"experiment={experiment}", "overrides=trainer.accumulate_grad_batches=2")
    with pytest.raises(Exception, match="accumulate_grad_batches"):
        fit.measure(options, experiment, "bare")


# -- turns, other checkouts and the page -----------------------------------------------------------------------------------


def test_arms_take_turns_and_a_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def turn(arm: turns.Arm, options: Namespace, tree: Path) -> dict[str, float]:
        order.append((arm.label, tree.name))
        if arm.arm == "broken":
            raise RuntimeError("ValueError: no")
        return {"seconds": float(len(order))}

    monkeypatch.setattr(turns, "turn", turn)
    arms = [turns.Arm("bridge", "64", "ours"), turns.Arm("bridge", "64", "ours", "old"), turns.Arm("bridge", "64", "broken")]
    turns.in_turns(arms, Namespace(repeats=2), {"old": Path("elsewhere")})
    here = turns.HERE.name
    assert order == [("ours", here), ("ours at old", "elsewhere"), ("broken", here), ("ours at old", "elsewhere"), ("ours", here)]
    assert arms[2].left_out == "ValueError: no" and [len(arm.turns) for arm in arms] == [2, 2, 0]


def test_page_gives_ratios_within_a_turn() -> None:
    first = turns.Arm(
        "ross", "step", "d", turns=[{"seconds": 0.1, "memory": 10.0, "gflop": 4.0}, {"seconds": 0.2, "memory": 10.0, "gflop": 4.0}]
    )
    other = turns.Arm(
        "ross",
        "step",
        "d",
        "c335c6a",
        turns=[{"seconds": 0.2, "memory": 15.0, "gflop": 4.0}, {"seconds": 0.4, "memory": 15.0, "gflop": 4.0}],
    )
    gone = turns.Arm("ross", "step", "official", left_out="no clone of the official code was given")
    machine = {"gflops": 80.0, "gbytes": 9.0, "pil": 1000.0}
    lines = report.page("Benchmarks", [first, other, gone], machine, {"machine": "m", "commit": "c", "load": 0.0}).splitlines()
    assert "| step | d at c335c6a | 300 | 2.00 | 2.00 - 2.00 | 15 | 1.50 | 17% |" in lines
    assert lines[-1] == "Left out: official (no clone of the official code was given)."


def test_sizes_are_those_of_the_benchmarks_that_were_named(capsys: pytest.CaptureFixture[str]) -> None:
    _, sizes = tool.chosen(["bridge", "ross", "lengths=64,256", "ross.batch=4"])
    given = tool.parser().parse_args([])
    assert tool.options_of("bridge", sizes, given).lengths == [64, 256]
    assert (tool.options_of("bridge", sizes, given).batch, tool.options_of("ross", sizes, given).batch) == (8, 4)
    assert tool.main(["bridge", "groups=3"]) == 2 and tool.main(["brigde"]) == 2
    assert "'groups'" in capsys.readouterr().err


def test_attention_on_the_processor_is_counted() -> None:
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8)
    forward = 2 * 2 * 2 * 3 * 5 * 7 * 8
    attend = torch.nn.functional.scaled_dot_product_attention
    assert base.gflop(lambda: attend(query, key, key)) == pytest.approx(forward / 1e9)
    assert base.gflop(lambda: attend(query, key, key).sum().backward()) == pytest.approx(3.5 * forward / 1e9)


@pytest.mark.processes
def test_another_commit_is_measured_by_the_arms_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "umm_zoo").mkdir()
    (tmp_path / "umm_zoo" / "__init__.py").write_text("")
    (tmp_path / "umm_zoo" / "methods.py").write_text("raise ImportError('the other umm_zoo')")
    arm = turns.Arm("bridge", "16", "ours", "other")
    with pytest.raises(RuntimeError, match="the other umm_zoo"):
        turns.turn(arm, smallest("bridge", tmp_path), tmp_path)


def test_a_commit_is_unpacked_and_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    if subprocess.run(["git", "rev-parse", "HEAD"], cwd=turns.HERE, capture_output=True).returncode:
        pytest.skip("not a clone")
    with turns.checkout("HEAD") as (name, tree):
        assert (tree / "umm_zoo" / "fit.py").exists() and len(name) >= 7
    (tmp_path / "umm_zoo").mkdir()
    with turns.checkout(str(tmp_path)) as (name, other):
        assert (name, other) == (tmp_path.name, tmp_path)


def test_numbers_of_all_turns_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(turns, "turn", lambda arm, options, tree: {"seconds": 0.5, "memory": 3.0})
    assert tool.main(["bridge", "--smallest", "--repeats", "2", "--out", str(tmp_path / "page.json")]) == 0
    found = json.loads((tmp_path / "page.json").read_text())
    assert found["arms"][0]["turns"] == [{"seconds": 0.5, "memory": 3.0}] * 2
    assert (tmp_path / "page.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"


# -- the clock of a loader's workers ----------------------------------------------------------------------------------------


def test_what_workers_have_ready_is_not_timed() -> None:
    taken = []

    def stream() -> Any:
        while True:
            taken.append(None)
            yield None

    loader.block(stream, workers=2, batches=3)
    assert len(taken) == 1 + 2 * 6 + 2 * 3  # six buffers to a worker


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.processes
def test_the_processor_time_of_workers_is_told_from_that_of_the_main_process() -> None:
    def stream() -> Any:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            while True:
                pool.apply(spin, (0.06,))
                spin(0.02)
                yield None

    _, worker, everything = loader.block(stream, workers=1, batches=3)
    assert worker == pytest.approx(0.06, rel=0.25) and everything == pytest.approx(0.08, rel=0.25)
