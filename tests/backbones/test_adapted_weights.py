"""Weights of a network that an adapter changes are not written without it, and an adapter keeps its rank and alpha."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.backbones.test_codecs import KL
from tests.backbones.test_features import VISION
from tests.backbones.test_sana import TINY as SANA
from tests.backbones.test_sd3 import CONFIG as SD3
from tests.backbones.vlm_parts import llava, qwen
from tests.methods.uae_parts import second_stage, third_stage
from tools.consolidate import consolidate
from umm_zoo.backbones.adapters import LoRA, adapters_of
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.sana import Sana
from umm_zoo.backbones.sd3 import StableDiffusion3
from umm_zoo.errors import UserError
from umm_zoo.training.run import load_weights

MODELS: dict[str, Any] = {
    "llava": llava,
    "qwen": qwen,
    "clip": lambda: CLIPVisionFeatures.from_config(VISION),
    "sana": lambda: Sana.from_config(SANA),
    "sd3": lambda: StableDiffusion3.from_config(SD3),
    "codec": lambda: KLCodec.from_config(KL),
}


@pytest.mark.parametrize("name", MODELS)
def test_saving_an_adapted_model_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    LoRA(2).attach(model)
    with pytest.raises(ValueError, match=r"\.save: found an adapter beside \d+ layers, such as .*LoRA.save"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def checkpoint(method: Any, file: Path, **changes: Any) -> Path:
    state = {"state_dict": method.state_dict(), "adapters": adapters_of(method), "experiment": {"method": {}}, "global_step": 1}
    method.on_save_checkpoint(state)
    torch.save({**state, **changes}, file)
    return file


def test_consolidating_an_adapted_run_is_refused(tmp_path: Path) -> None:
    file = checkpoint(second_stage(), tmp_path / "step-00000001.ckpt")
    with pytest.raises(UserError, match="found weights with an adapter beside them"):
        consolidate(file, tmp_path / "all.safetensors")
    assert not (tmp_path / "all.safetensors").exists()


@pytest.mark.parametrize(("make", "name"), [(second_stage, "adapter"), (third_stage, "decoder_adapter")])
@pytest.mark.parametrize("version", ["own", "earlier"])
def test_another_alpha_in_a_later_stage_is_refused(make: Any, name: str, version: str, tmp_path: Path) -> None:
    method = make()
    file = checkpoint(method, tmp_path / "step-00000001.ckpt")
    if version == "earlier":  # the experiment alone says it
        stored = torch.load(file)
        del stored["adapters"]
        node = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": 2, "alpha": 4.0}
        torch.save({**stored, "experiment": {"method": {name: node}}}, file)
    load_weights(make(), file, "next.yaml")
    lora = LoRA(rank=2, alpha=16.0, targets=getattr(method, name).targets)
    with pytest.raises(UserError, match=f"method.{name}: found rank 2 and alpha 16, expected rank 2 and alpha 4"):
        load_weights(make(**{name: lora}), file, "next.yaml")
