"""Parts, freezing, optimiser groups, checkpoints that hold what was trained."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer
from torch import nn
from toy_parts import Body, Head, OneWeight, Toy, ToyData, toy_experiment

from umm_zoo.backbones.frozen import FrozenBackbone, freeze
from umm_zoo.batch import Batch
from umm_zoo.blocks.quantizers.vector import VectorQuantizer
from umm_zoo.errors import UserError
from umm_zoo.training.optimization import AdamW, Constant, WarmupCosine
from umm_zoo.training.setup import TrainingSetup


def toy(*trained: str, optimizer: AdamW | None = None) -> Toy:
    method = Toy(Body(4, 3, dropout=0.5), Head(3))
    TrainingSetup(list(trained), optimizer or AdamW(lr=0.1), WarmupCosine(10)).prepare(method)
    return method


def test_untrained_parts_are_frozen_by_type_and_cannot_be_woken() -> None:
    method = toy("head").train()
    assert isinstance(method.body, FrozenBackbone) and isinstance(method.body, Body)
    assert not method.body.training and not method.body.dropout.training and method.head.training
    assert [key for key, p in method.named_parameters() if p.requires_grad] == ["head.linear.weight", "head.linear.bias"]


def test_freezing_keeps_the_running_statistics() -> None:
    norm = freeze(nn.BatchNorm1d(3))
    norm.train()
    norm(torch.randn(8, 3))
    assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]


def test_misspelt_part_is_named() -> None:
    with pytest.raises(ValueError, match=r"found 'haed', expected \['body', 'head'\]; did you mean 'head'\?"):
        toy("haed")


def test_parameter_in_no_part_or_in_two_is_refused() -> None:
    class Loose(Toy):
        def parts(self) -> dict[str, nn.Module]:
            return {"body": self.body}

    class Twice(Toy):
        def parts(self) -> dict[str, nn.Module]:
            return {"body": self.body, "head": self.head, "both": self.body.linear}

    for kind, words in (
        (Loose, "parameter 'head.linear.weight' stands in no part"),
        (Twice, "'body' and 'both' share a parameter"),
    ):
        with pytest.raises(ValueError, match=words):
            kind(Body(4, 3), Head(3)).train_only(["body"])


def test_one_group_per_part_with_its_own_rate() -> None:
    method = toy("body", "head", optimizer=AdamW(lr=0.1, weight_decay=0.2, part_lr={"head": 0.01}))
    groups = method.configure_optimizers()["optimizer"].param_groups
    # warm-up lasts ceil(10 * .03) = 1 step, so the schedule's first factor is 1
    assert [(group["name"], group["lr"], group["weight_decay"]) for group in groups] == [
        ("body", 0.1, 0.2),
        ("body (vectors)", 0.1, 0.0),
        ("head", 0.01, 0.2),
        ("head (vectors)", 0.01, 0.0),
    ]
    with pytest.raises(ValueError, match="found 'haed', expected the trained parts"):
        toy("head", optimizer=AdamW(lr=0.1, part_lr={"haed": 1.0})).configure_optimizers()


def test_a_part_may_have_betas_of_its_own() -> None:
    method = toy("body", "head", optimizer=AdamW(0.1, betas=(0.8, 0.99), part_betas={"head": (0.0, 0.9)}))
    groups = method.configure_optimizers()["optimizer"].param_groups
    assert [group["betas"] for group in groups] == [(0.8, 0.99)] * 2 + [(0.0, 0.9)] * 2
    method.training_losses(Batch(["a"], [[]]))["loss"].backward()
    optimizer = method.configure_optimizers()["optimizer"]
    optimizer.step()
    for part, gradients in (("body", 0.2), ("head", 1.0)):  # the first moment is (1 - beta) g
        parameter = method.parts()[part].linear.bias
        torch.testing.assert_close(optimizer.state[parameter]["exp_avg"], gradients * parameter.grad)
    with pytest.raises(ValueError, match=r"optimizer\.part_betas: found 'haed', expected the trained parts"):
        toy("head", optimizer=AdamW(0.1, part_betas={"haed": (0.0, 0.9)})).configure_optimizers()


def test_codebooks_are_not_decayed() -> None:
    method = Toy(Body(4, 3), Head(3))
    method.head.quantizer = VectorQuantizer(2, 5)
    TrainingSetup(["head"], AdamW(lr=0.1, weight_decay=0.5, decay_vectors=True)).prepare(method)
    before = copy.deepcopy(method.head)
    for parameter in method.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    method.configure_optimizers().step()
    tables = dict(before.quantizer.named_parameters())
    assert tables and all(torch.equal(method.head.quantizer.get_parameter(name), table) for name, table in tables.items())
    torch.testing.assert_close(method.head.linear.weight, 0.95 * before.linear.weight)


@pytest.mark.parametrize(("way", "norms"), [("norm", {"body": 0.5, "head": 0.5}), ("value", {"body": 0.3, "head": 0.3})])
def test_a_part_may_be_clipped_by_a_norm_of_its_own(way: str, norms: dict[str, float]) -> None:
    class Apart(Toy):
        clipped_apart = ("head", "no part of this run")

    method = Apart(Body(1, 1), Head(1))
    method.train_only(["body", "head"])
    for size, part in ((3.0, method.body), (200.0, method.head)):
        part.linear.weight.grad, part.linear.bias.grad = torch.full((1, 1), size), torch.zeros(1)
    precision = SimpleNamespace(clip_gradients=lambda *_: nn.utils.clip_grad_value_(method.parameters(), 0.3))
    method._trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(model=None), precision_plugin=precision, gradient_clip_val=0.5, gradient_clip_algorithm=way
    )
    method._fabric = None
    method.configure_gradient_clipping(torch.optim.SGD(method.parameters()), 0.5, way)
    for name, part in method.parts().items():
        assert part.linear.weight.grad.item() == pytest.approx(norms[name], rel=1e-4)


def test_losses_know_the_number_of_updates_before_theirs_in_a_resumed_run_too(tmp_path: Path) -> None:
    class Counted(OneWeight):
        def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
            seen.append(self.step.number)
            return super().training_losses(batch)

    seen: list[int] = []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    for steps, source in ((2, None), (4, tmp_path / "at-2.ckpt")):
        method = Counted()
        method.train_only(["layer"])
        trainer = Trainer(max_steps=steps, accumulate_grad_batches=2, accelerator="cpu", limit_val_batches=0, **quiet)
        trainer.fit(method, ToyData(train_size=20), ckpt_path=source)
        trainer.save_checkpoint(tmp_path / f"at-{steps}.ckpt")
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3]


def test_schedules_follow_their_formula() -> None:
    cosine = WarmupCosine(100, warmup_ratio=0.1, final_factor=0.2)
    assert [cosine.factor(step) for step in (0, 9, 10, 55, 100, 200)] == pytest.approx([0.1, 1.0, 1.0, 0.6, 0.2, 0.2])
    assert [Constant(4).factor(step) for step in (0, 3, 9)] == [0.25, 1.0, 1.0] and Constant().factor(0) == 1.0
    with pytest.raises(ValueError, match=r"found 0 and 0.03"):
        WarmupCosine(0)


def test_checkpoint_holds_trained_and_inherited_parts_only() -> None:
    first, second = toy("body"), toy("head")
    checkpoint = {"state_dict": dict(first.state_dict())}
    first.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {"body.linear.weight", "body.linear.bias"}
    second.load_weights(checkpoint["state_dict"])
    assert torch.equal(second.body.linear.weight, first.body.linear.weight)
    assert second.checkpoint_keys() == set(second.state_dict())


def test_checkpoint_that_lacks_or_adds_keys_is_refused() -> None:
    state = dict(toy("body", "head").state_dict())
    method = toy("body", "head")
    with pytest.raises(ValueError, match=r"2 trained tensors are missing, such as 'head.linear.bias'"):
        method.on_load_checkpoint({"state_dict": {key: v for key, v in state.items() if key.startswith("body")}})
    with pytest.raises(ValueError, match=r"1 tensors have no place in this method, such as 'tail.weight'"):
        method.on_load_checkpoint({"state_dict": {**state, "tail.weight": torch.ones(1)}})
    method.on_load_checkpoint({"state_dict": state})


def test_weights_of_an_earlier_stage_survive_a_resume() -> None:
    first, second = toy("body"), toy("head")
    second.load_weights({key: v for key, v in first.state_dict().items() if key.startswith("body")})
    checkpoint = {"state_dict": dict(second.state_dict())}
    second.on_save_checkpoint(checkpoint)
    resumed = toy("head")
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.checkpoint_keys() == set(checkpoint["state_dict"]) == set(first.state_dict())


def test_weights_that_do_not_fit_are_refused() -> None:
    method = toy("head")
    with pytest.raises(ValueError, match=r"tensor 'haed.linear.bias' .* did you mean 'head.linear.bias'\?"):
        method.load_weights({"haed.linear.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"'head.linear.bias' is \[2\] in the earlier stage, \[1\] here"):
        method.load_weights({"head.linear.bias": torch.ones(2)})


def test_load_says_what_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found no checkpoint there \(looked for .*step-\*.ckpt"):
        Toy.load(tmp_path)


def test_load_asks_for_its_own_class(tmp_path: Path) -> None:
    class Other(Toy):
        pass

    node = toy_experiment()["method"]
    node["body"]["out_dim"] = node["head"]["in_dim"] = 3
    torch.save({"experiment": {"method": node}, "state_dict": {}}, tmp_path / "a.ckpt")
    assert isinstance(Toy.load(tmp_path / "a.ckpt", trust=["toy_parts"]), Toy)
    with pytest.raises(TypeError, match="holds a Toy, expected a Other"):
        Other.load(tmp_path / "a.ckpt", trust=["toy_parts"])


def test_a_method_without_a_training_map_says_so() -> None:
    with pytest.raises(UserError, match="training: found nothing, expected the trained parts and an optimizer"):
        Toy(Body(4, 3), Head(3)).configure_optimizers()
