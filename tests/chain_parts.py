"""A method whose every kind of state matters to its next loss: what a resumed run forgets shows in one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback
from torch import Tensor, nn

from data_pipelines.shards.writing import write_shards
from umm_zoo.backbones.adapters import LoRA
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.outputs import Outputs


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.linear(x).tanh())


class Stack(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Chain(Method):
    """Regresses numbers made of the samples' keys; with ``noise``, on torch's, numpy's and Python's random numbers too, and on
    rollouts that are drawn every third step from a generator of its own and used up one by one."""

    def __init__(
        self,
        width: int,
        depth: int,
        noise: float = 0.0,
        adapter: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.stack, self.head, self.width, self.noise = Stack(width, depth), nn.Linear(width, 1), width, noise
        self.mirror = self.head  # tied weights: two names in state_dict
        self.adapter = adapter
        if adapter is not None:
            adapter.attach(self.stack)
        self.own, self.rollouts = torch.Generator().manual_seed(5), []  # type: ignore[var-annotated]

    def parts(self) -> dict[str, nn.Module]:
        parts: dict[str, nn.Module] = {"stack": self.stack, "head": self.head}
        return parts if self.adapter is None else {**parts, "adapter": self.adapter}

    def _features(self, batch: Batch) -> Tensor:
        numbers = [[(ord(key[i % len(key)]) * (i + 3)) % 17 / 17 for i in range(self.width)] for key in batch.keys]
        return torch.tensor(numbers, device=self.device)

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        x = self._features(batch)
        goal = x.mean(1)
        if self.noise:
            import random

            import numpy as np

            if not self.rollouts:
                self.rollouts = list(torch.randn(3, generator=self.own))
            x = x + self.noise * (torch.randn_like(x) + float(np.random.rand()) + random.random())
            goal = goal + self.noise * self.rollouts.pop()
        return {"loss": (self.head(self.stack(x))[:, 0] - goal).square().mean()}

    def validation_step(self, batch: Batch, batch_idx: int) -> Outputs:
        loss = self.training_losses(batch)["loss"] if not self.noise else self.head(self.stack(self._features(batch))).mean()
        return Outputs({"loss": loss + 0 * torch.rand(())})

    def run_state(self) -> dict[str, Any]:
        return {"own": self.own.get_state(), "rollouts": self.rollouts} if self.noise else {}

    def load_run_state(self, state: dict[str, Any]) -> None:
        self.own.set_state(state["own"])
        self.rollouts = list(state["rollouts"])


class MeanLosses(Callback):
    """Appends every training loss, averaged over the ranks, to a file, bit for bit."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        if trainer.is_global_zero:
            with self.file.open("a") as stream:
                stream.write(f"{trainer.global_step} {float(loss).hex()}\n")


def chain_experiment(folder: Path, trained: list[str] | None = None, **method: Any) -> str:
    """Write shards and an experiment file of these parts into ``folder``; returns the file's name."""
    for split, count in (("train", 23), ("val", 5)):
        samples = [
            {"__key__": "k" * (i % 4) + f"{i:03d}", "json": {"task": "t", "kind": "k", "conversations": []}} for i in range(count)
        ]
        write_shards(samples, folder / split, "s", samples_per_shard=4)
    tree = {
        "seed": 3,
        "vars": {"steps": 12},
        "method": {
            "_target_": "chain_parts.Chain",
            "width": 6,
            "depth": 3,
            **method,
        },
        "training": {
            "trained": ["stack", "head"] if trained is None else trained,
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.01, "weight_decay": 0.1},
            "schedule": {"_target_": "umm_zoo.training.optimization.WarmupCosine", "total_steps": 100, "warmup_ratio": 0.1},
        },
        "data": {
            "_target_": "data_pipelines.shards.data.ShardData",
            "train": {"all": {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "train"}},
            "val": {"all": {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "val"}},
            "batch_size": 4,
            "image_size": 8,
            "val_batch_size": 2,
            "window": 2,
        },
        "callbacks": {"losses": {"_target_": "chain_parts.MeanLosses", "file": "${name}.txt"}},
        "trainer": {
            "max_steps": "${vars.steps}",
            "val_check_interval": 1000,
            "gradient_clip_val": 0.5,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
        },
    }
    (folder / "chain.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return "chain.yaml"


def losses(file: Path) -> dict[int, str]:
    """Loss by step; a step that was done twice, after a resume, must have come out the same."""
    found: dict[int, str] = {}
    for line in file.read_text().splitlines():
        step, loss = line.split()
        assert found.setdefault(int(step), loss) == loss, f"step {step} came out differently after a resume"
    return found
