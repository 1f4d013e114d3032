"""Adapters of any method: parts of their own beside others that stay as they are, by the experiment's map ``adapters``."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_parts import Body, Head, Toy, toy_experiment, write_yaml

from tests.backbones.test_sana import inputs as sana_inputs
from tests.backbones.test_sana import sana
from tests.backbones.vlm_parts import CONVERSATIONS, COUNTS, llava, qwen, random_images
from tests.methods.bridge_parts import CODEC, SANA, requests, tiny_vlm
from tests.methods.uae_parts import second_stage
from umm_zoo.backbones.adapters import LoRA, adapters_of, learns
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.precomputable import weights_hash
from umm_zoo.backbones.sana import Sana
from umm_zoo.batch import Batch
from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
from umm_zoo.blocks.pathways import FrozenPathway
from umm_zoo.blocks.queries import LearnedQueries
from umm_zoo.errors import UserError
from umm_zoo.experiment.build import build_method
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment
from umm_zoo.method import Method
from umm_zoo.methods.llava import LLaVA
from umm_zoo.methods.metaquery import MetaQuery
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.run import load_weights
from umm_zoo.training.setup import TrainingSetup

NODE = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": 2, "alpha": 4.0}
ROWS = Batch(keys=["a", "bb"], conversations=[[], []])


def toy(*trained: str, **adapters: LoRA) -> Toy:
    torch.manual_seed(0)
    method = Toy(Body(4, 3), Head(3))
    for part, adapter in adapters.items():
        method.adapt(part, adapter)
    if trained:
        TrainingSetup(list(trained), AdamW(lr=0.1)).prepare(method)
    return method


def saved(method: Method, file: Path, tree: dict[str, Any] | None = None) -> Path:
    state: dict[str, Any] = {
        "state_dict": method.state_dict(),
        "adapters": adapters_of(method),
        "experiment": tree or {"method": {}},
    }
    method.on_save_checkpoint(state)
    torch.save({**state, "global_step": 1}, file)
    return file


def step(method: Method, batch: Batch) -> None:
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.1)
    method.training_losses(batch)["loss"].backward()
    optimizer.step()


# -- against peft --------------------------------------------------------------------------------------------------------------


def shaken(adapter: LoRA) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return {key.replace("/", "."): own for key, own in adapter.layers.items()}  # type: ignore[misc]


def same_gradients(peft_model: Any, additions: dict[str, Any]) -> None:
    found = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    assert len(found) == 2 * len(additions)
    for key, addition in additions.items():
        for own, theirs in ((addition.down, "lora_A"), (addition.up, "lora_B")):
            torch.testing.assert_close(own.grad, found[f"base_model.model.{key}.{theirs}.default.weight"], atol=1e-6, rtol=1e-5)


def test_a_language_model_with_an_adapter_is_pefts(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    vlm = llava()
    twin, method = copy.deepcopy(vlm), LLaVA(vlm)
    method.adapt("language_model", LoRA(2, 4.0, ["q_proj", "down_proj"]))
    additions = shaken(method.adapters["language_model"])  # type: ignore[arg-type]
    method.adapters["language_model"].save(tmp_path)  # type: ignore[operator]
    batch = Batch(keys=["a", "b", "c"], conversations=CONVERSATIONS, images=random_images(vlm), image_counts=COUNTS)
    theirs = peft.PeftModel.from_pretrained(twin.language_model, str(tmp_path), is_trainable=True)
    for model in (vlm, twin):
        model(model.inputs_of(batch)).loss.backward()
    torch.testing.assert_close(vlm(vlm.inputs_of(batch)).nll, twin(twin.inputs_of(batch)).nll, atol=1e-6, rtol=1e-6)
    same_gradients(theirs, additions)


def test_a_decoder_with_an_adapter_is_pefts_and_merged_says_the_same(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own = sana()
    twin, adapter = copy.deepcopy(own), LoRA(2, 4.0)
    adapter.attach(own)
    additions = shaken(adapter)
    adapter.save(tmp_path, whole=own.model)
    theirs = peft.PeftModel.from_pretrained(twin.model, str(tmp_path), is_trainable=True)
    given = sana_inputs()
    for model in (own, twin):
        model(*given).square().sum().backward()
    torch.testing.assert_close(own(*given), twin(*given), atol=1e-6, rtol=1e-6)
    same_gradients(theirs, {key.removeprefix("model."): value for key, value in additions.items()})
    before = own(*given)
    adapter.merge()
    torch.testing.assert_close(own(*given), before, atol=1e-5, rtol=1e-5)
    own.save(tmp_path / "merged")


# -- a method's ----------------------------------------------------------------------------------------------------------------


def test_the_part_stays_and_a_checkpoint_holds_the_adapter_and_trained_parts(tmp_path: Path) -> None:
    method = toy("head", "body_adapter", body=LoRA(2, 4.0))
    before = copy.deepcopy(method.body.state_dict())
    step(method, ROWS)
    assert all(torch.equal(value, before[key]) for key, value in method.body.state_dict().items())
    assert method.adapters["body"].layers["linear"].up.any()  # type: ignore[index, union-attr]
    held = torch.load(saved(method, tmp_path / "a.ckpt"))["state_dict"]
    assert {key.split(".")[0] for key in held} == {"head", "adapters"} and "adapters.body.layers.linear.up" in held


def test_a_copy_of_a_method_has_additions_of_its_own() -> None:
    method = toy(body=LoRA(2, 4.0))
    twin = copy.deepcopy(method)
    torch.nn.init.ones_(twin.adapters["body"].layers["linear"].up)  # type: ignore[index, union-attr, arg-type]
    x = torch.ones(1, 4)
    assert torch.equal(method.body(x), toy().body(x)) and not torch.equal(twin.body(x), method.body(x))


def test_a_file_puts_adapters_in_and_null_takes_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tree = {**toy_experiment(), "adapters": {"body": NODE}}
    tree["training"]["trained"] = ["head", "body_adapter"]
    file = write_yaml(tmp_path / "adapted.yaml", tree)
    check(experiment := load_experiment(file))
    method = build_method(experiment.method_tree)
    assert list(method.adapters) == ["body"] and list(method.all_parts()) == ["body", "head", "body_adapter"]
    assert load_experiment(file, ["adapters.body=null"]).adapters == {}
    again = Method.load(
        saved(toy("head", "body_adapter", body=LoRA(2, 4.0)), tmp_path / "a.ckpt", experiment.resolved()), ["toy_parts"]
    )
    assert list(again.adapters) == ["body"]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({**NODE, "rnak": 2}, "adapters.body.rnak: found an unknown argument 'rnak'"),
        ({**NODE, "_target_": "toy_parts.Head", "in_dim": 3}, "adapters.body: found a node of toy_parts.Head"),
        ("lora", "adapters.body: found 'lora'"),
    ],
)
def test_a_node_is_checked(node: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        check(load_experiment(write_yaml(tmp_path / "wrong.yaml", {**toy_experiment(), "adapters": {"body": node}})))


def test_what_cannot_have_an_adapter_is_one_line() -> None:
    with pytest.raises(
        UserError, match=r"adapters.bdoy: found an adapter of 'bdoy', expected one of body, head; did you mean 'body'"
    ):
        toy(bdoy=LoRA())
    with pytest.raises(UserError, match=r"training.trained: found 'body', which has an adapter, expected 'body_adapter' alone"):
        toy("body", "body_adapter", body=LoRA())
    with pytest.raises(ValueError, match="found another adapter beside 'linear'"):
        toy(body=LoRA()).adapt("body", LoRA())
    with pytest.raises(ValueError, match="expected adapt before train_only"):
        toy("head").adapt("body", LoRA())
    with pytest.raises(ValueError, match="found a LayerNorm without linear layers"):
        LoRA().attach(torch.nn.LayerNorm(3))


def test_uae_has_places_of_its_own() -> None:
    with pytest.raises(UserError, match=r"adapters.language_model: found an adapter of 'language_model', expected method.adapter"):
        second_stage().adapt("language_model", LoRA())
    with pytest.raises(UserError, match=r"adapters.connector: .*which .* never trains, expected parts that this stage trains"):
        second_stage().adapt("connector", LoRA())


def test_an_adapter_that_no_gradient_reaches_ends_the_first_step() -> None:
    class Blind(Toy):
        def training_losses(self, batch: Batch) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                states = self.body(torch.ones(2, 4))
            return {"loss": self.head(states).square().mean()}

    method = Blind(Body(4, 3), Head(3))
    method.adapt("body", LoRA(2))
    method.train_only(["head", "body_adapter"])
    step(method, ROWS)
    with pytest.raises(UserError, match="found 'body_adapter', which no gradient reaches: Blind runs 'body' without"):
        method.check_reached()
    reached = toy("body_adapter", body=LoRA(2))
    step(reached, ROWS)
    reached.check_reached()


def test_a_frozen_tower_with_an_adapter_has_a_gradient_and_its_unused_layers_none() -> None:
    method = LLaVA(llava())
    method.adapt("vision_tower", LoRA(2))
    method.train_only(["vision_tower_adapter"])
    layers = method.adapters["vision_tower"].layers  # type: ignore[union-attr]
    assert any("layers/1/" in name for name in layers) and not any("layers/2/" in name for name in layers)
    assert learns(method.vlm.vision_tower)
    batch = Batch(keys=["a"], conversations=CONVERSATIONS[:1], images=random_images(method.vlm, 1), image_counts=[1])
    method.training_losses(batch)["loss"].backward()
    assert all(p.grad is not None for p in method.adapters.parameters())


def test_layers_beside_an_adapter_are_computed_again_where_that_is_asked_for() -> None:
    found = []
    for again in (False, True):
        method, calls = LLaVA(qwen(gradient_checkpointing=again)), list[int]()
        method.adapt("language_model", LoRA(2))
        shaken(method.adapters["language_model"])  # type: ignore[arg-type]
        method.train_only(["language_model_adapter"])
        method.train()
        method.vlm.text_model.layers[0].self_attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = Batch(keys=["a"], conversations=CONVERSATIONS[:1], images=random_images(method.vlm, 1), image_counts=[1])
        method.training_losses(batch)["loss"].backward()
        found.append([p.grad for p in method.adapters.parameters()])
        assert len(calls) == 1 + again
    torch.testing.assert_close(*found)


# -- stages --------------------------------------------------------------------------------------------------------------------


def test_a_stage_stands_on_what_the_one_before_trained(tmp_path: Path) -> None:
    first = toy("body")
    step(first, ROWS)
    second = toy("body_adapter", body=LoRA(2, 4.0))
    load_weights(second, saved(first, tmp_path / "first.ckpt"), "next.yaml")
    x = torch.ones(2, 4)
    assert torch.equal(second.body(x), first.body(x))
    step(second, ROWS)
    file = saved(second, tmp_path / "second.ckpt")
    assert "body.linear.weight" in torch.load(file)["state_dict"]
    third = toy("head", body=LoRA(2, 4.0))
    load_weights(third, file, "next.yaml")
    assert torch.equal(third.body(x), second.body(x)) and not torch.equal(third.body(x), first.body(x))
    with pytest.raises(UserError, match=r"adapters.body: found no adapter, expected rank 2 and alpha 4, with which"):
        load_weights(toy("head"), file, "next.yaml")
    with pytest.raises(UserError, match=r"adapters.body: found rank 2 and alpha 8, expected rank 2 and alpha 4"):
        load_weights(toy("head", body=LoRA(2, 8.0)), file, "next.yaml")


def test_stored_outputs_are_of_a_part_and_its_adapter() -> None:
    method = toy(body=LoRA(2, 4.0))
    plain, before = weights_hash(toy().body), weights_hash(method.body)
    step(method, ROWS)
    assert len({plain, before, weights_hash(method.body)}) == 3


def test_additions_in_float32_learn_beside_weights_in_bfloat16_and_merged_they_say_the_same() -> None:
    vlm = llava(dtype="bfloat16")
    method = LLaVA(vlm)
    method.adapt("language_model", LoRA(2, 4.0))
    method.train_only(["language_model_adapter"])
    before = {name: value.clone() for name, value in vlm.state_dict().items()}
    batch = Batch(keys=["a", "b", "c"], conversations=CONVERSATIONS, images=random_images(vlm), image_counts=COUNTS)
    step(method, batch)
    additions = list(method.adapters.parameters())
    assert {p.dtype for p in additions} == {torch.float32} and all(p.grad is not None for p in additions)
    assert all(torch.equal(value, before[name]) for name, value in vlm.state_dict().items())
    vlm.float()
    adapted = method.training_losses(batch)["loss"]
    method.adapters["language_model"].merge()  # type: ignore[operator]
    torch.testing.assert_close(method.training_losses(batch)["loss"], adapted, atol=1e-5, rtol=1e-5)


def test_metaquery_learns_by_an_adapter_of_its_decoder() -> None:
    method = MetaQuery(
        tiny_vlm(),
        LearnedQueries(32, 3),
        FrozenPathway(),
        MetaQueryConnector(32, 12, 1, 2),
        Sana.from_config(SANA),
        KLCodec.from_config(CODEC),
        FlowMatching(num_steps=2),
        image_size=8,
    )
    method.adapt("decoder", LoRA(2, 4.0))
    method.train_only(["queries", "connector", "decoder_adapter"])
    before = copy.deepcopy(method.decoder.state_dict())
    step(method, requests(1, 0))
    assert all(torch.equal(value, before[key]) for key, value in method.decoder.state_dict().items())
    ups = [own for name, own in method.adapters.named_parameters() if name.endswith("up")]
    assert ups and all(own.any() for own in ups)
