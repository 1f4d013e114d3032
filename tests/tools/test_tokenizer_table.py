"""The table of tokenizers, on codecs and scores made for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tools import tokenizer_table
from umm_zoo.backbones.diffusion_codec import DiffusionCodec
from umm_zoo.backbones.features import DINOv2Features
from umm_zoo.backbones.patch_codec import PatchEncoder, PatchPixelDenoiser
from umm_zoo.backbones.visual_tokenizer import Branch, VisualTokenizer
from umm_zoo.blocks.bottlenecks import Bottleneck, LinearProjection
from umm_zoo.blocks.pixel_decoders import ViTPixelDecoder
from umm_zoo.blocks.quantizers import BinaryQuantizer, NoQuantizer, Quantizer
from umm_zoo.objectives.flow_matching import FlowMatching

VISION = {"hidden_size": 8, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}


def branch(quantizer: Quantizer) -> Branch:
    return Branch(Bottleneck(LinearProjection(8, quantizer.dim), quantizer, LinearProjection(quantizer.dim, 8)))


def tokenizer(**quantizers: Quantizer) -> VisualTokenizer:
    branches = {name: branch(quantizer) for name, quantizer in quantizers.items()}
    return VisualTokenizer(DINOv2Features.from_config(VISION), branches, ViTPixelDecoder(8, 8, 8, 1, 2)).eval()


def flow() -> DiffusionCodec:
    return DiffusionCodec(PatchEncoder(3, 8, 8, 1, 2), PatchPixelDenoiser(3, 8, 8, 1, 2), FlowMatching(num_steps=2)).eval()


def test_sizes_count_the_bits_of_all_branches() -> None:
    assert tokenizer_table.size_of(tokenizer(pixel=BinaryQuantizer(12))) == "16 x 12 bits"
    assert tokenizer_table.size_of(tokenizer(pixel=BinaryQuantizer(12), semantic=BinaryQuantizer(12))) == "16 x 24 bits"
    assert tokenizer_table.size_of(tokenizer(pixel=NoQuantizer(5))) == "16 x 5 numbers"
    assert tokenizer_table.size_of(flow()) == "16 x 3 numbers"


@pytest.mark.parametrize("codec", [tokenizer(pixel=BinaryQuantizer(12)), tokenizer(pixel=NoQuantizer(5)), flow()])
def test_every_codec_has_its_two_speeds(codec: DiffusionCodec) -> None:
    found = tokenizer_table.speeds(codec, batch=3, repeats=1)
    assert set(found) == {"encode", "decode"} and min(found.values()) > 0


def test_speed_is_the_median_of_the_calls_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(tokenizer_table.time, "process_time", lambda: next(clock))
    calls: list[int] = []
    assert tokenizer_table.per_second(lambda inputs: calls.append(len(inputs)), torch.zeros(6, 1), 3) == 3.0
    assert calls == [6] * 4


def test_rows_are_means_over_runs_and_a_dash_where_nothing_was_scored() -> None:
    runs = [{"size": "16 x 12 bits", "val/pixels/psnr": value, "encode": 1000.0, "recall": 0.5} for value in (20.0, 23.0)]
    assert tokenizer_table.row_of("BSQ", runs) == ["BSQ", "16 x 12 bits", "21.5", *"-----", "0.50", "1000", "-", "2"]


def test_a_run_is_not_measured_again_and_a_row_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"size": "16 x 12 bits", "val/pixels/psnr": 20.0}
    kept = {"settings": {"words": [], "repeats": 5}, "scores": scores}
    for seed in range(2):
        (tmp_path / f"one-seed{seed}").mkdir()
        (tmp_path / f"one-seed{seed}" / tokenizer_table.FILE).write_text(json.dumps(kept))
    assert tokenizer_table.main([f"one={tmp_path}/one-seed*", "--out", str(tmp_path / "t.md")]) == 0
    assert "| one | 16 x 12 bits | 20.0 | 2 |" in (tmp_path / "t.md").read_text() and "| 2 |" in capsys.readouterr().out
    assert tokenizer_table.main([f"one={tmp_path}/other-*"]) == 2 and "no run folder" in capsys.readouterr().err
