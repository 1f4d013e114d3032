"""Quantised frozen parts: what is refused, what they take, and where a library is installed, adapters beside them that learn."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from library_checkpoints import checkpoint
from torch import nn

from tests.backbones.test_pretrained_vlm import COUNTS, IMAGES, ROWS
from tests.backbones.vlm_parts import qwen
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.precomputable import weights_hash
from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.quantization import Quantization, assert_writable
from umm_zoo.backbones.quantized import assert_castable, find_quantized, held, is_quantized, stored_as, stored_bytes
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.methods.llava import LLaVA

EIGHT = {"quant_method": "bitsandbytes", "load_in_8bit": True}
FOUR = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
BATCH = Batch(keys=["a", "b", "c"], conversations=ROWS, images=IMAGES, image_counts=COUNTS)


def marked(bits: int, group: int | None, **config: object) -> PretrainedVLM:
    source = str(checkpoint("qwen2_5_vl"))
    with torch.device("meta"):
        vlm = PretrainedVLM.from_pretrained(source, dtype="float32")
        Quantization(SimpleNamespace(llm_int8_skip_modules=None, **config), "bitsandbytes", bits, group).mark(vlm.model)
    return vlm


@pytest.fixture(scope="module")
def quantised() -> PretrainedVLM:
    return marked(8, None)


def test_linear_layers_take_a_byte_or_half_of_one_and_scales(quantised: PretrainedVLM) -> None:
    own = {name: stored_bytes(p) for name, p in quantised.named_parameters() if is_quantized(p)}
    linear = {f"{name}.weight": layer for name, layer in quantised.named_modules() if isinstance(layer, nn.Linear)}
    assert own.keys() == {name for name in linear if "lm_head" not in name}
    up = "model.model.language_model.layers.0.mlp.up_proj.weight"  # 40 x 32
    assert own[up] == 40 * 32 + 4 * 40 and stored_as(dict(quantised.named_parameters())[up]) == "bitsandbytes 8 bit"
    four = dict(marked(4, 64).named_parameters())[up]
    assert stored_bytes(four) == 40 * 32 // 2 + 4 * 20
    double = dict(marked(4, 64, bnb_4bit_use_double_quant=True).named_parameters())[up]
    assert stored_bytes(double) == 40 * 32 // 2 + 20 + 4
    embeddings = dict(quantised.named_parameters())["model.model.language_model.embed_tokens.weight"]
    assert stored_bytes(embeddings) == 4 * embeddings.numel() and not is_quantized(embeddings)


def test_a_quantised_part_is_frozen_and_its_adapter_is_not(quantised: PretrainedVLM) -> None:
    method = LLaVA(quantised)
    with pytest.raises(UserError, match=r"'language_model', whose .* is quantised.*can be trained: adapters.language_model"):
        method.train_only(["language_model"])
    with pytest.raises(UserError, match=r"quantised weights .* of which a trained copy is to be made"):
        quantised.language_stack(copied=True)
    with pytest.raises(ValueError, match=r"found quantised weights.*LoRA.save"):
        assert_writable(quantised.model, "PretrainedVLM.save")
    key = "vlm.model.model.language_model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UserError, match="trained in an earlier stage, expected a part that is not quantised"):
        method.load_weights({key: torch.ones(40, 32)})
    with pytest.raises(UserError, match=r"bf16-true and quantised weights in float32.*dtype: bfloat16"):
        assert_castable(method, "bf16-true")


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"quant_method": "gptq"}, r"quantization.quant_method: found 'gptq', expected one of bitsandbytes, torchao"),
        ("8bit", "found '8bit'"),
        ({**EIGHT, "load_in_8bits": True}, r"load_in_8bits: found an unknown argument.*did you mean 'load_in_8bit'"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_8bit nor load_in_4bit"),
    ],
)
def test_what_is_wrong_is_one_line(stated: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umm_zoo.backbones.quantization.find_spec", lambda name: True)
    with pytest.raises(UserError, match=message):
        Quantization.read(stated, "transformers")  # type: ignore[arg-type]


def test_a_missing_library_is_one_line_in_a_check_too(monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(checkpoint("qwen2_5_vl"))
    monkeypatch.setattr("umm_zoo.backbones.quantization.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"no package bitsandbytes.*umm_zoo\[quantization\]"), torch.device("meta"):
        PretrainedVLM.from_pretrained(source, quantization=EIGHT)


# -- with a library, where it is installed -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stated", [EIGHT, FOUR, INT8], ids=["8 bit", "4 bit", "torchao"])
def test_an_adapter_learns_beside_weights_that_stay_bit_for_bit(stated: dict[str, object], tmp_path) -> None:
    if not importlib.util.find_spec(str(stated["quant_method"])):
        pytest.skip(f"no {stated['quant_method']}")
    source = str(checkpoint("qwen3_vl"))
    vlm = PretrainedVLM.from_pretrained(source, quantization=stated, dtype="float32")
    with torch.device("meta"):
        counted = PretrainedVLM.from_pretrained(source, quantization=stated, dtype="float32")
    assert [name for name, p in vlm.named_parameters() if is_quantized(p)] == [
        name for name, p in counted.named_parameters() if is_quantized(p)
    ]
    method = LLaVA(vlm)
    method.adapt("language_model", LoRA(2, 4.0))
    before = {name: value.clone() for name, value in held(vlm)}
    method.train_only(["language_model_adapter"])
    with torch.no_grad():
        first = method.training_losses(BATCH)["loss"]
    loss = method.training_losses(BATCH)["loss"]
    loss.backward()
    plain = LLaVA(PretrainedVLM.from_pretrained(source, dtype="float32"))
    torch.testing.assert_close(loss, first, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, plain.training_losses(BATCH)["loss"], atol=0.5 if stated is FOUR else 0.05, rtol=0)
    ups = [own for name, own in method.adapters.named_parameters() if name.endswith("up")]
    assert ups and all(own.grad is not None and own.grad.any() for own in ups)
    assert all(torch.equal(value, before[name]) for name, value in held(vlm))
    vlm = PretrainedVLM.from_pretrained(source, quantization=stated, dtype="float32")
    vlm.save(tmp_path)
    assert weights_hash(PretrainedVLM.from_pretrained(str(tmp_path), dtype="float32")) == weights_hash(vlm)
    with pytest.raises(ValueError, match="quantised already"):
        PretrainedVLM.from_pretrained(str(tmp_path), quantization=stated)


def test_a_plain_model_has_none() -> None:
    assert find_quantized(qwen()) is None
