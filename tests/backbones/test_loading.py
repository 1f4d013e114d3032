"""Checkpoints of the transformers library: where they are looked for, and which are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.backbones.test_features import VISION
from tests.backbones.vlm_parts import LLAVA, QWEN
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.loading import find_source
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL

PART = "experiments/tiny/weights/tower"


def test_a_shipped_part_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_source(PART), "config.json").is_file()
    assert find_source("organisation/name") == "organisation/name"  # a public name stays one


def test_a_folder_below_the_current_one_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / PART).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_source(PART) == PART


@pytest.mark.parametrize(("kind", "config"), [(CLIPVisionFeatures, VISION), (LlavaBackbone, LLAVA), (Qwen25VL, QWEN)])
def test_weights_that_do_not_fill_the_model_are_refused(kind: Any, config: dict[str, Any], tmp_path: Path) -> None:
    kind.from_config(config).save(tmp_path)
    path, metadata = tmp_path / "model.safetensors", {"format": "pt"}
    weights = load_file(path)
    name = next(key for key in weights if key.endswith("bias"))
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata)
    with pytest.raises(ValueError, match=rf"1 tensors missing, such as .*{name.split('.')[-2]}\.bias"):
        kind.from_pretrained(str(tmp_path))
    save_file({**weights, "stranger": torch.zeros(1)}, path, metadata)
    with pytest.raises(ValueError, match=r"1 tensors unexpected, such as .*stranger"):
        kind.from_pretrained(str(tmp_path))
    save_file({**weights, name: torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"1 tensors of another shape, such as .*bias"):
        kind.from_pretrained(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere', expected a name or folder with weights"):
        kind.from_pretrained(str(tmp_path / "nowhere"))
