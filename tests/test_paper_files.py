"""Experiment files of paper size, built on the meta device: what the papers publish, and that it fits together."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from test_experiment_files import EXPERIMENTS

from data_pipelines.shards.data import ShardData
from umm_zoo.experiment.file import Experiment, load_experiment
from umm_zoo.methods.bagel import Bagel
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.harmon import Harmon
from umm_zoo.methods.janus import Janus
from umm_zoo.methods.llava import LLaVA
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.unified_grpo import UnifiedCaptionAndDrawing
from umm_zoo.objectives.flow_matching import ContrastiveFlowMatching, FlowMatching
from umm_zoo.objectives.times import ShiftedTimes
from umm_zoo.training.setup import Built, build_experiment

ROOT = Path(__file__).resolve().parents[1] / "experiments"
FROM_STAGE_2 = ["queries", "pathway", "connector", "detail", "decoder"]
#: One layer of Qwen2.5-3B is 77.08 M parameters (arithmetic from its published sizes); the copy has 36 of them and a final norm.
LAYER = 2 * 2048 * 2048 + 2048 + 2 * (2048 * 256 + 256) + 3 * 2048 * 11008 + 2 * 2048
COPY = 36 * LAYER + 2048


FILES = [file.removeprefix("experiments/") for file in EXPERIMENTS if "/paper/" in file]


@cache
def on_meta(file: str) -> tuple[Experiment, Built]:
    """The experiment and what is built of it, for several tests that only look at it."""
    experiment = load_experiment(ROOT / file)
    with torch.device("meta"):
        return experiment, build_experiment(experiment)


@pytest.mark.parametrize("file", FILES)
def test_it_is_built_without_memory_and_without_reading_weights(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    built = on_meta(file)[1]
    trained = {name for name, part in built.method.parts().items() if any(p.requires_grad for p in part.parameters())}
    assert trained <= set(built.method.trained) and trained
    small = {
        "tokenizers": 8e7,
        "bagel": 9e8,
        "harmon": 7e8,
    }  # Epsilon-VAE (M) has 34 M in its encoder and 49 M in its decoder; Qwen2.5-0.5B
    least = small.get(file.partition("/")[0], 2e9)
    assert all(p.is_meta for p in built.method.parameters()) and sum(p.numel() for p in built.method.parameters()) > least


@pytest.mark.parametrize(("size", "width", "head", "language"), [("0.5b", 768, 35_749_920, 896), ("1.5b", 1280, 151_206_944, 1536)])
def test_harmon_is_of_the_sizes_of_mar_and_qwen(size: str, width: int, head: int, language: int) -> None:
    method = on_meta(f"harmon/paper/{size}-stage3.yaml")[1].method
    assert isinstance(method, Harmon) and method.vlm.width == language and method.vlm.encoder.width == method.decoder.width == width
    assert sum(p.numel() for p in method.head.parameters()) == head and method.vlm.encoder.num_buffers == 64
    assert method.vlm.codec.latent_grid(512, 512).num_cells == 1024
    assert sum(p.numel() for p in method.vlm.codec.parameters()) == 66_456_019  # MAR's KL-16, attention in its last level too


@pytest.mark.parametrize(
    ("file", "contrast", "trained", "steps", "batch", "pixels", "cells"),
    [
        ("wemmu/paper/stage1.yaml", 0.05, FROM_STAGE_2[:-1], 34_000, 2336, 512, 16),
        ("wemmu/paper/stage2.yaml", None, FROM_STAGE_2, 44_000, 584, 1024, 32),
        ("wemmu/paper/stage3.yaml", None, FROM_STAGE_2, 34_200, 584, 1024, 32),
        ("wemmu/paper/stage4.yaml", None, FROM_STAGE_2, 7_400, 584, 1024, 32),
    ],
)
def test_wemmu_is_what_its_paper_says(
    file: str, contrast: float | None, trained: list[str], steps: int, batch: int, pixels: int, cells: int
) -> None:
    experiment, built = on_meta(file)
    method, data, trainer = built.method, built.data, experiment.trainer
    assert isinstance(method, Bridge) and isinstance(data, ShardData)
    assert type(method.objective) is (FlowMatching if contrast is None else ContrastiveFlowMatching)
    assert getattr(method.objective, "weight", None) == contrast
    assert sorted(method.trained) == sorted(trained)
    assert (trainer["max_steps"], data.batch_size, data.transform.image_size, method.image_size) == (steps, batch, pixels, pixels)
    assert batch % (8 * trainer["num_nodes"]) == 0  # nodes of eight share the batch out evenly
    assert method.codec.latent_grid(pixels, pixels) == (cells, cells)
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in method.parts().items()}
    assert counts["pathway"] == COPY and counts["detail"] == 32 * 2048 + 2048 and counts["queries"] == 0
    assert sum(counts[name] for name in ("vision_tower", "projector", "language_model", "codec")) == 0
    decoder = sum(p.numel() for p in method.decoder.parameters())
    assert 1.59e9 < decoder < 1.62e9 and counts["decoder"] == (decoder if "decoder" in trained else 0)
    assert 8.3e9 < sum(p.numel() for p in method.parameters()) < 8.6e9  # the paper's tables call it 8B


def test_metaquery_trains_queries_connector_and_decoder_around_a_frozen_language_model() -> None:
    method = on_meta("metaquery/paper/stage1.yaml")[1].method
    assert isinstance(method, Bridge)
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in method.parts().items()}
    assert counts["queries"] == 257 * 2048 and counts["pathway"] == counts["language_model"] == 0
    layer = 16 * 2048**2 + 7 * 2048  # attention with three biases and two gains per channel of a head, feed-forward, two norms
    assert counts["connector"] == 24 * layer + 2048 * 2304 + 2304**2 + 3 * 2304 and counts["decoder"] > 1.59e9


def test_openuni_trains_queries_and_connector_at_first() -> None:
    method = on_meta("metaquery/paper/openuni-stage1.yaml")[1].method
    assert isinstance(method, Bridge)
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in method.parts().items()}
    assert {name for name, count in counts.items() if count} == {"queries", "connector"}
    encoder = 6 * (4 * 1536**2 + 2 * 1536 * 8960 + 9 * 1536 + 8960)  # OpenUni-L's
    assert counts["connector"] == encoder + 2048 * 1536 + 1536 + 1536 * 2304 + 2304 and counts["queries"] == 256 * 2048


def test_emma_fuses_four_tokens_and_a_cell_into_one() -> None:
    method = on_meta("tokenizers/paper/emma.yaml")[1].method
    assert isinstance(method, LLaVA) and method.trained == ["projector"]
    counts = {name: sum(p.numel() for p in part.parameters() if p.requires_grad) for name, part in method.parts().items()}
    adapter = 4640 * 4640 + 4640 + 4640 * 2560 + 2560
    assert counts == {"vision_tower": 0, "projector": adapter + 64 * 64 * 2560, "language_model": 0, "codec": 0}
    assert method.vlm.image_grid(512, 512) == (16, 16) and 4.0e9 < sum(p.numel() for p in method.parameters()) < 5.2e9


ADAPTERS = ["projector", "image_embeddings", "image_projector", "image_head"]


@pytest.mark.parametrize(
    ("stage", "trained", "lr", "batch", "steps", "shares"),
    [
        (1, ADAPTERS, 1e-3, 256, (20_000, 20_000), {"understanding": 1, "images": 3}),
        (2, [*ADAPTERS, "language_model"], 1e-4, 512, (360_000, 360_000), {"understanding": 2, "text": 3, "images": 5}),
        (
            3,
            [*ADAPTERS, "language_model", "vision_tower"],
            4e-5,
            128,
            (80_000, 40_000),
            {"understanding": 5, "text": 1, "images": 4},
        ),
    ],
)
@pytest.mark.parametrize(("size", "width", "inner", "layers"), [("1b", 2048, 5632, 24), ("7b", 4096, 11008, 30)])
def test_janus_pro_is_what_its_paper_says(
    size: str,
    width: int,
    inner: int,
    layers: int,
    stage: int,
    trained: list[str],
    lr: float,
    batch: int,
    steps: tuple[int, int],
    shares: dict,
) -> None:
    experiment, built = on_meta(f"janus/paper/{size}-stage{stage}.yaml")
    method, data, trainer = built.method, built.data, experiment.trainer
    assert isinstance(method, Janus) and isinstance(data, ShardData)
    assert (sorted(method.trained), experiment.training["optimizer"]["lr"]) == (sorted(trained), lr)
    assert (data.batch_size, trainer["max_steps"]) == (batch, steps[size == "7b"])
    assert {name: source.weight for name, source in data.sources["train"].items()} == shares
    data.check_shares(trainer["devices"] * trainer.get("num_nodes", 1), trainer["accumulate_grad_batches"])
    assert (method.grid, method.vlm.codec.num_codes, method.guidance, method.dropout) == ((24, 24), 16384, 5.0, 0.1)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in method.parts().items()}
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    assert counts["language_model"] == layers * layer + width + 2 * 102400 * width
    assert counts["image_head"] == width**2 + width + width * 16384 + 16384
    assert counts["image_embeddings"] == 8 * 16384 and counts["image_projector"] == 9 * width + width**2 + width
    assert counts["projector"] == 1025 * width + width**2 + width


@pytest.mark.parametrize(("size", "width", "inner", "layers"), [("1b", 2048, 5632, 24), ("7b", 4096, 11008, 30)])
def test_the_second_family_of_uae_on_janus_pro(size: str, width: int, inner: int, layers: int) -> None:
    experiment, built = on_meta(f"janus/paper/{size}-rl.yaml")
    method = built.method
    assert isinstance(method, UnifiedCaptionAndDrawing) and method.trained == ["adapter"]
    assert sum(p.numel() for p in method.adapter.parameters()) == layers * 32 * (4 * 2 * width + 3 * (width + inner))
    assert {name for name, part in method.parts().items() if any(p.requires_grad for p in part.parameters())} == {"adapter"}
    assert (method.rollouts.group, method.scale, method.renderer.temperature, method.objective.clip) == (4, 5.0, 1.0, 0.01)
    assert (method.objective.kl_weight, experiment.training["optimizer"]["lr"]) == (1e-6, 1e-6)
    assert next(method.vlm.language_model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            "metaquery/paper/stage1.yaml",
            "<|im_start|>system\nYou will be given an image or its caption. Please describe the content of the image in detail in "
            "your own words.<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n<|im_start|>assistant\n\n",
        ),
        (
            "metaquery/paper/openuni-stage1.yaml",
            "<|im_start|>user\nGenerate an image: a cat<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_prompts_are_those_of_the_releases(file: str, expected: str) -> None:
    method = on_meta(file)[1].method
    assert isinstance(method, Bridge)
    request = method.dropout.prompts.apply(request_batch(["a cat"]), ["full"])
    pieces = method.vlm.template.render(request.conversations[0], for_generation=True)
    assert "".join(piece.text for piece in pieces) + method.queries.opening == expected


@pytest.mark.parametrize(("stage", "warmup", "modes"), [(1, 500, [1.0, 0.5, 0.5] * 2), (2, 0, [1.0] * 2)])
def test_irg_fine_tunes_the_released_bagel_as_its_scripts_do(stage: int, warmup: int, modes: list[float]) -> None:
    experiment, built = on_meta(f"irg/paper/bagel-stage{stage}.yaml")
    method, training = built.method, experiment.training
    assert isinstance(method, Bagel) and set(method.trained) == set(method.parts()) - {"codec"}
    assert method.dropout.shares == {"text": 0.0, "seen": 0.0, "clean": 0.3} and method.ce_weight == method.flow_weight == 1.0
    assert training["optimizer"]["lr"] == 2e-5 and training["schedule"]["warmup_steps"] == warmup
    assert [own["weight"] for own in experiment.data["train"].values() if own] == modes
    assert isinstance(times := method.objective.times, ShiftedTimes) and times.shift == 4.0
    guided = vars(method.edit_guidance)
    assert (guided["text"], guided["image"], guided["low"], guided["renorm"]) == (4.0, 2.0, 0.0, "text_channel")
    assert experiment.callbacks["average"]["decay"] == 0.995
