"""Files of weights that are none, or only a part: one line, before anything large is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig

from tests.backbones.test_codecs import KL
from tests.backbones.test_features import VISION
from tests.backbones.vlm_parts import CLIP, LLAMA, LLAVA, QWEN
from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.backbones.text_encoder import TextEncoder
from umm_zoo.backbones.tokenizer import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 438\n"
PAGE = b"\n<!DOCTYPE html><html><body>Sign in</body></html>"
every_kind = pytest.mark.parametrize(("kind", "config"), [(CLIPVisionFeatures, VISION), (KLCodec, KL), (LlavaBackbone, LLAVA)])


@every_kind
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: POINTER, "a Git-LFS pointer"),
        (lambda whole: PAGE, "a web page"),
        (lambda whole: b"", "an empty file"),
        (lambda whole: whole[:-7], "cut short"),
        (lambda whole: whole[:40], "beginning of one"),
        (lambda whole: whole + b"more", "as its header says"),
        (lambda whole: whole[:8] + b"[" + whole[9:], "unreadable header"),
    ],
    ids=["pointer", "page", "empty", "cut", "head", "longer", "header"],
)
def test_weights_that_are_none_are_one_line(kind: Any, config: Any, content: Any, message: str, tmp_path: Path) -> None:
    kind.from_config(config).save(tmp_path)
    file = next(tmp_path.glob("*model.safetensors"))
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=f"{file.name}: found .*{message}") as raised:
        kind.from_pretrained(str(tmp_path))
    assert "\n" not in str(raised.value)


@every_kind
@pytest.mark.parametrize("content", [POINTER, PAGE, b"", b'{"a": 1', b"\xff\xfe"])
def test_a_configuration_that_is_none_is_one_line(kind: Any, config: Any, content: bytes, tmp_path: Path) -> None:
    kind.from_config(config).save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: found") as raised:
        kind.from_pretrained(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_shards_that_are_missing_are_named(tmp_path: Path) -> None:
    model = CLIPVisionFeatures.from_config(VISION).model
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    CLIPVisionFeatures.from_pretrained(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"index.json: found .*such as '{shards[1].name}'"):
        CLIPVisionFeatures.from_pretrained(tmp_path)


def test_variants_of_diffusers_folders_load(tmp_path: Path) -> None:
    codec = KLCodec.from_config(KL, dtype="float16")
    codec.model.save_pretrained(tmp_path / "vae", variant="fp16")
    again = KLCodec.from_pretrained(tmp_path, subfolder="vae", variant="fp16")
    torch.testing.assert_close(again.model.decoder.conv_in.weight, codec.model.decoder.conv_in.weight.float())
    with pytest.raises(ValueError, match="found weights of 'fp16' alone, expected 'variant: fp16'"):
        KLCodec.from_pretrained(tmp_path, subfolder="vae")
    codec.save(tmp_path)
    with pytest.raises(ValueError, match="found weights without a variant 'bf16', expected 'no variant'"):
        KLCodec.from_pretrained(tmp_path, variant="bf16")


def test_files_that_are_not_read_may_be_pointers(tmp_path: Path) -> None:
    CLIPVisionFeatures.from_config(VISION).save(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    (tmp_path / "model.fp16.safetensors").write_bytes(POINTER)
    CLIPVisionFeatures.from_pretrained(tmp_path)


# -- other models --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models by type, and those of which only the configuration is there: nothing else is read."""
    made = {
        name: tmp_path_factory.mktemp(name)
        for name in ("llava", "qwen2_5_vl", "clip_vision_model", "gpt2", "opt", "bloom", "original")
    }
    LlavaBackbone.from_config(LLAVA).save(made["llava"])
    Qwen25VL.from_config(QWEN).save(made["qwen2_5_vl"])
    CLIPVisionFeatures.from_config(VISION).save(made["clip_vision_model"])
    GPT2Config().save_pretrained(made["gpt2"])
    OPTConfig().save_pretrained(made["opt"])
    BloomConfig().save_pretrained(made["bloom"])
    original = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip",
        "hidden_size": 8,
    }
    (made["original"] / "config.json").write_text(json.dumps(original))
    return made


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (LlavaBackbone, "qwen2_5_vl", "found a model of type 'qwen2_5_vl', expected 'llava'; use umm_zoo.*Qwen25VL"),
        (LlavaBackbone, "gpt2", "found a model of type 'gpt2', expected 'llava'"),
        (LlavaBackbone, "original", "LLaVA's original layout.*llava-hf/llava-1.5-7b-hf"),
        (Qwen25VL, "llava", "found a model of type 'llava', expected 'qwen2_5_vl'; use umm_zoo.*LlavaBackbone"),
        (TextEncoder, "opt", "found a model of type 'opt', expected 't5'"),
        (CLIPVisionFeatures, "gpt2", "found a model of type 'gpt2', expected 'clip_vision_model'"),
        (KLCodec, "llava", "found "),
    ],
)
def test_another_model_is_refused_by_its_type(kind: Any, name: str, message: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        kind.from_pretrained(str(folders[name]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["bloom", "qwen2_5_vl", "clip_vision_model", "original"])
def test_a_language_model_that_cannot_stand_in_a_llava_is_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"found .*(a model of type|original layout)") as raised:
        LlavaBackbone.from_parts(CLIP, str(folders[name]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen2_5_vl"])
def test_a_tower_that_is_none_is_refused(name: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=rf"vision_tower: .*found '{name}.*', expected \['clip_vision_model'"):
        LlavaBackbone.from_parts(str(folders[name]), LLAMA)


# -- tokenizers ----------------------------------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, added: int) -> None:
    tokens = load_tokenizer()
    tokens.add_tokens([f"<new{number}>" for number in range(added)])
    for old in folder.glob("tokenizer*"):
        old.unlink()
    tokens.save_pretrained(folder)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_added_tokens_without_embeddings_are_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    kind: Any = {"llava": LlavaBackbone, "qwen2_5_vl": Qwen25VL}[name]
    shutil.copytree(folders[name], tmp_path / "model")
    with_tokenizer(tmp_path / "model", 3)
    with pytest.raises(ValueError, match=r"tokenizer: found ids up to 1026, expected fewer than .* 1024, such as '<new2>'"):
        kind.from_pretrained(str(tmp_path / "model"))


def test_spare_embeddings_are_usual(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 1100})).save_pretrained(tmp_path)
    with_tokenizer(tmp_path, 3)
    assert len(LlavaBackbone.from_parts(CLIP, str(tmp_path)).tokenizer) == 1027


@pytest.mark.parametrize("content", [POINTER, PAGE, b"", b"{}"])
def test_a_tokenizer_that_is_none_is_one_line(content: bytes, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match="tokenizer") as raised:
        LlavaBackbone.from_pretrained(str(tmp_path / "model"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("kind", "name"), [(LlavaBackbone, "qwen2_5_vl"), (Qwen25VL, "llava"), (CLIPVisionFeatures, "gpt2")])
def test_a_check_refuses_another_model_as_training_does(kind: Any, name: str, folders: dict[str, Path]) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=f"found a model of type '{name}'"):
        kind.from_pretrained(str(folders[name]))


@pytest.mark.parametrize("name", ["text_config", "vision_config"])
def test_a_part_that_is_null_is_not_the_library_s_default_of_gigabytes(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llava"], tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: None}))
    with pytest.raises(ValueError, match=rf"config\.json: found no '{name}'"):
        LlavaBackbone.from_pretrained(str(tmp_path / "model"))


@every_kind
def test_a_folder_without_a_configuration(kind: Any, config: Any, tmp_path: Path) -> None:
    kind.from_config(config).save(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: found JSON that is no map"):
        kind.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json") as raised:
        kind.from_pretrained(str(tmp_path))
    assert "\n" not in str(raised.value)
