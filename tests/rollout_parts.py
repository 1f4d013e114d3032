"""UAE's reinforcement stages, tiny, as an experiment file names them; and a run that dies at a step."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning import Callback
from PIL import Image
from torch import Tensor

from data_pipelines.shards.writing import write_shards
from tests.backbones.janus_parts import janus
from tests.methods import uae_parts as tiny
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch
from umm_zoo.methods.dual_grpo import DualGRPO
from umm_zoo.methods.dual_settings import ThoughtImages
from umm_zoo.methods.reasoning import Reasoner
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.decoder_grpo import UnderstandingForGeneration
from umm_zoo.methods.uae.readers import RewriteReader
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.methods.uae.token_renderer import TokenRenderer
from umm_zoo.methods.uae.unified_grpo import UnifiedCaptionAndDrawing
from umm_zoo.objectives.flow_grpo import FlowGRPO
from umm_zoo.objectives.grpo import GRPO, ConstantLength

SAVING = "umm_zoo.checkpoints.callback.LastCheckpoint"
TRAINED = {"Decoder": ["decoder_adapter"], "Dual": ["adapter", "decoder_adapter"]}
CAPTIONS = CaptionSampling(tiny.PROMPT, max_new_tokens=5)


class FlatOn(tiny.Redness):
    """Nothing to compare on one rank."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self.rank = rank

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        found = super().score(candidates, batch)
        return torch.zeros_like(found) if os.environ.get("LOCAL_RANK") == str(self.rank) else found


class Captioner(GenerationForUnderstanding):
    def __init__(self, updates: int = 1, group: int = 3, flat_on: int | None = None) -> None:
        super().__init__(
            tiny.vlm(),
            tiny.renderer(),
            FlatOn(flat_on),
            GRPO(aggregation=ConstantLength(5), kl_weight=0.1 if flat_on is None else 0.0),
            adapter=LoRA(rank=2, alpha=4.0),
            captions=CAPTIONS,
            rollouts=Rollouts(group, updates_per_rollout=updates, micro_batch=2),
            num_steps=3,
        )


class Decoder(UnderstandingForGeneration):
    def __init__(self, updates: int = 1, group: int = 3, flat_on: int | None = None) -> None:
        super().__init__(
            tiny.vlm(),
            tiny.renderer(),
            FlatOn(flat_on),
            FlowGRPO(num_steps=3, clip=1e-2, kl_weight=0.1),
            decoder_adapter=LoRA(rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v", "to_out.0"]),
            captions=CAPTIONS,
            rollouts=Rollouts(group, updates_per_rollout=updates),
            guidance=2.0,
        )


class Unified(UnifiedCaptionAndDrawing):
    def __init__(self, updates: int = 1, group: int = 3, flat_on: int | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(
            janus(),
            TokenRenderer(guidance=2.0),
            FlatOn(flat_on),
            GRPO(kl_weight=0.1 if flat_on is None else 0.0),
            adapter=LoRA(rank=2, alpha=4.0),
            captions=CAPTIONS,
            rollouts=Rollouts(group, updates_per_rollout=updates, micro_batch=2),
        )


class Dual(DualGRPO):
    def __init__(self, updates: int = 1, group: int = 2, flat_on: int | None = None) -> None:
        super().__init__(
            tiny.vlm(),
            tiny.renderer(reader=RewriteReader()),
            Reasoner(max_new_tokens=5, temperature=1.0),
            FlatOn(flat_on),
            FlatOn(flat_on),
            GRPO(kl_weight=0.1 if flat_on is None else 0.0),
            FlowGRPO(num_steps=3, clip=1e-2),
            adapter=LoRA(rank=2, alpha=4.0),
            decoder_adapter=LoRA(rank=2, alpha=4.0, targets=["to_q", "to_k", "to_v", "to_out.0"]),
            rollouts=Rollouts(group, updates_per_rollout=updates, micro_batch=2),
            images=ThoughtImages(2),
        )


class DieAt(Callback):
    """SIGKILL behind a step, once its checkpoint is written."""

    def __init__(self, step: int, signum: int = signal.SIGKILL) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.signum)


def rollout_experiment(folder: Path, method: str, **arguments: Any) -> str:
    """Write shards and an experiment file of such a stage into ``folder``; returns the file's name."""
    random = np.random.default_rng(0)

    def png() -> bytes:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    turns = [{"role": "user", "text": tiny.PROMPT}, {"role": "assistant", "text": "a small red circle"}]
    rows = [{"__key__": f"s{i:02d}", "json": {"conversations": turns, "scene": {"n": i}}, "0.png": png()} for i in range(14)]
    write_shards(rows, folder / "train", "s", samples_per_shard=5)
    task = {"_target_": f"data_pipelines.{'generation_tasks.FromCaption' if method == 'Dual' else 'tasks.Conversations'}"}
    tree = {
        "seed": 3,
        "method": {"_target_": f"rollout_parts.{method}", **arguments},
        "training": {
            "trained": TRAINED.get(method, ["adapter"]),
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.02},
        },
        "data": {
            "_target_": "data_pipelines.shards.data.ShardData",
            "train": {"all": {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "train", "task": task}},
            "batch_size": 4,
            "image_size": 8,
        },
        "callbacks": {
            "checkpoint": {"_target_": "umm_zoo.checkpoints.callback.LastCheckpoint", "every_n_train_steps": 1, "keep": 9}
        },
        "trainer": {
            "max_steps": 5,
            "val_check_interval": 1000,
            "accumulate_grad_batches": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    (folder / "stage.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return "stage.yaml"
