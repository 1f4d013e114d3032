"""LLaVA of a few thousand weights as an experiment file names it, and rows with answers of 1 and of 120 tokens."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import tiny_configs
import torch
import yaml
from lightning import LightningDataModule
from PIL import Image
from torch.utils.data import DataLoader

from data_pipelines.shards.writing import write_shards
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.batch import Batch
from umm_zoo.methods.llava import LLaVA

TEXT = tiny_configs.llama(model_type="qwen2", num_key_value_heads=1, max_position_embeddings=512)
ROWS, BAD = 23, (2, 5, 6, 13)


class TinyLLaVA(LLaVA):
    def __init__(self) -> None:
        torch.manual_seed(0)
        config = {"vision_config": tiny_configs.clip(), "text_config": TEXT, "vision_feature_layer": -1}
        super().__init__(LlavaBackbone.from_config(config))


def turns(row: int) -> list[dict[str, str]]:
    image = "<image>\n" if row % 3 else ""
    answer = " ".join(["red"] * 118) if row % 4 == 1 else "blue"
    return [{"role": "user", "text": f"{image}Which colour is number {row}?"}, {"role": "assistant", "text": answer}]


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 255, (8, 8, 3), dtype=np.uint8)


def png(row: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(row)).save(file, "PNG")
    return file.getvalue()


class OwnData(LightningDataModule):
    """A loader of torch's own, with micro-batches of the given size; the last ones of an epoch are a shorter step."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def train_dataloader(self) -> DataLoader[Any]:
        images = [torch.from_numpy(pixels(row)).permute(2, 0, 1) / 127.5 - 1 for row in range(10)]
        shown = [row for row in range(10) if row % 3]
        counts = [int(row % 3 > 0) for row in range(10)]
        keys, conversations = [f"row{row}" for row in range(10)], [turns(row) for row in range(10)]
        whole = Batch(keys, conversations, torch.stack([images[row] for row in shown]), counts)  # type: ignore[arg-type]
        return DataLoader(range(10), batch_size=self.size, collate_fn=lambda rows: whole.select(rows))  # type: ignore[arg-type]


def exact_experiment(folder: Path) -> str:
    """Write shards and an experiment file into ``folder``; returns the file's name."""
    rows: list[dict[str, Any]] = []
    for row in range(ROWS):
        rows.append({"__key__": f"s{row:02d}", "json": {"conversations": turns(row)}} | ({"0.png": png(row)} if row % 3 else {}))
    write_shards(rows, folder / "train", "s", samples_per_shard=5)
    bad = {"0.png": b"none"}
    write_shards([row | (bad if i in BAD else {}) for i, row in enumerate(rows)], folder / "spoilt", "s", samples_per_shard=5)
    tree = {
        "seed": 3,
        "method": {"_target_": "exact_parts.TinyLLaVA"},
        "training": {
            "trained": ["projector", "language_model"],
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 0.003},
        },
        "callbacks": {"average": {"_target_": "umm_zoo.training.ema.EMA", "decay": 0.4}},
        "data": {
            "_target_": "data_pipelines.shards.data.ShardData",
            "train": {"all": {"_target_": "data_pipelines.shards.data.ShardSource", "shards": "train"}},
            "batch_size": 8,
            "image_size": 8,
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 1000,
            "gradient_clip_val": 0.3,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
    }
    (folder / "exact.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return "exact.yaml"
