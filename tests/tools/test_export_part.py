"""A part exported from a tiny run: its weights, its card, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from data_pipelines.shapes import main as make_shapes
from tools import export_part
from tools.part_card import world_commands
from tools.probing import load_part
from umm_zoo.experiment.file import load_experiment
from umm_zoo.method import Method
from umm_zoo.training.curriculum import run as fit

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip
CELLS = ["top left", "top right", "bottom left", "bottom right"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower trained for two steps on a world of its own, after a first stage of one step."""
    folder = tmp_path_factory.mktemp("export")
    numbers = ["--seed", "7", "--train", "16", "--val", "8", "--test", "60", "--heldout", "0", "--samples-per-shard", "50"]
    assert make_shapes([str(folder / "world"), "--tasks", "captions", "--shapes", "3", *numbers]) == 0
    source = {"_target_": "data_pipelines.shards.data.ShardSource"}
    experiment = {
        "name": "parts/first",
        "method": {
            "_target_": "umm_zoo.pretraining.supervised_tower.SupervisedTower",
            "tower": {"_target_": "umm_zoo.backbones.features.CLIPVisionFeatures.from_config", "config": VISION, "image_size": 32},
            "labels": {
                "_target_": "umm_zoo.pretraining.supervised_tower.CellLabels",
                "cells": CELLS,
                "attributes": {"size": ["small", "large"]},
            },
        },
        "training": {
            "trained": ["tower", "heads"],
            "optimizer": {"_target_": "umm_zoo.training.optimization.AdamW", "lr": 1e-3},
        },
        "data": {
            "_target_": "data_pipelines.shards.data.ShardData",
            "train": {"captions": {**source, "shards": f"{folder}/world/train/captions-*.tar"}, "questions": None},
            "val": {"captions": {**source, "shards": f"{folder}/world/val/captions-*.tar"}},
            "image_size": 32,
            "batch_size": 4,
        },
        "metrics": {"held_out": {"_target_": "umm_zoo.metrics.Means", "names": ["size_accuracy"]}},
        "trainer": {"max_steps": 1, "val_check_interval": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    }
    (folder / "first.yaml").write_text(yaml.safe_dump(experiment))
    second = {"base": "first.yaml", "after": "first.yaml", "name": "parts/second", "trainer": {"max_steps": 2}}
    (folder / "second.yaml").write_text(yaml.safe_dump(second))
    assert fit(load_experiment(folder / "second.yaml"), runs=str(folder / "runs")) == 0
    return folder / "runs" / "parts" / "second"


def test_exported_weights_load_bit_equal(run: Path, tmp_path: Path) -> None:
    export_part.export(run, tmp_path / "tower", "float32")
    trained, loaded = Method.load(run).tower.state_dict(), load_part(str(tmp_path / "tower")).state_dict()
    assert trained.keys() == loaded.keys() and all(torch.equal(trained[key], loaded[key]) for key in trained)


def test_weights_are_stored_in_the_precision_asked_for(run: Path, tmp_path: Path) -> None:
    card = export_part.export(run, tmp_path / "tower", "float16")
    stored = load_file(tmp_path / "tower" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.float16}
    assert card["weights_bytes"] == (tmp_path / "tower" / "model.safetensors").stat().st_size
    loaded = load_part(str(tmp_path / "tower")).state_dict()
    for key, value in Method.load(run).tower.state_dict().items():
        if value.is_floating_point():
            assert loaded[key].dtype == torch.float32 and torch.equal(loaded[key], value.half().float()), key


def test_the_card_says_how_the_part_was_made_and_what_it_scores(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tower"
    export_part.main([str(run), "--out", str(folder), "--test", "--probe", "size"])
    card, report = json.loads((folder / "card.json").read_text()), json.loads((run / "metrics.json").read_text())
    assert card["recipe"]["steps"] == 2 and card["recipe"]["batch_size"] == 4 and card["commit"] == report["commit"]
    (stage,) = card["recipe"]["after"]
    assert stage["steps"] == 1 and card["seconds"] == pytest.approx(report["seconds"] + stage["seconds"], abs=0.06)
    assert card["scores"]["val"] == {
        "samples": 8,
        "metrics": {"held_out/size_accuracy": report["metrics"]["val/held_out/size_accuracy"]},
    }
    assert card["scores"]["test"]["samples"] == 60 and 0 <= card["scores"]["test"]["metrics"]["held_out/size_accuracy"] <= 1
    assert [(found["attribute"], found["layer"]) for found in card["probes"]] == [("size", -2)]
    assert [(source["split"], source["samples"], source["read"]) for source in card["sources"]] == [
        ("train", 16, 8),
        ("val", 8, None),
    ]
    text = (folder / "README.md").read_text()
    (command,) = card["worlds"][0]["commands"]
    for said in (
        report["commit"],
        command,
        "2 steps of 4 samples",
        "first.yaml`: 1 steps",
        "image_size: 32",
        "60 samples",
    ):
        assert str(said) in text, said


def test_the_world_can_be_made_again_from_the_card(run: Path, tmp_path: Path) -> None:
    world = run.parents[2] / "world"
    (command,) = world_commands(tmp_path / "again", json.loads((world / "world.json").read_text()))
    assert make_shapes(command.split()[3:]) == 0
    for name in ("world.json", "train/captions-000000.tar", "test/captions-000001.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()


def test_tasks_written_in_other_numbers_are_commands_of_their_own() -> None:
    parts = {
        f"{split}/{task}": {"samples": n, "samples_per_shard": 9}
        for task, n in (("captions", 4), ("pairs", 4))
        for split in ("val", "test", "heldout")
    }
    parts["train/captions"] = {"samples": 5, "samples_per_shard": 9, "caption_order": "random"}
    parts |= {"val/edits": {"samples": 3, "samples_per_shard": 9}}
    world = {
        "cells": 3,
        "num_colours": 4,
        "num_shapes": 2,
        "max_objects": 3,
        "image_size": 32,
        "detail": "mark",
        "sizes": ["large"],
    }
    commands = world_commands(Path("w"), {"seed": 2, "world": world, "parts": parts})
    head = "python -m data_pipelines.shapes w --seed 2 --cells 3 --sizes large"
    assert commands == [
        f"{head} --train 5 --val 4 --test 4 --caption-order random --tasks captions,pairs --samples-per-shard 9",
        f"{head} --train 0 --val 3 --test 0 --tasks edits --samples-per-shard 9",
    ]


def test_what_the_run_said_of_its_part_is_kept_for_loading() -> None:
    class Kind:
        pass

    node = export_part.load_node(Kind(), {"system_prompt": None, "config": {}, "max_pixels": 9}, Path("weights/vlm"))
    assert node.pop("_target_").endswith("Kind.from_pretrained")
    assert node == {"source": "weights/vlm", "system_prompt": None, "max_pixels": 9}


def test_unfinished_runs_and_missing_test_splits_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(source: Path, *options: str) -> str:
        assert export_part.main([str(source), "--out", str(tmp_path / "out"), *options]) == 2
        return capsys.readouterr().err

    report = run / "metrics.json"
    assert "found no checkpoint there" in refused(tmp_path / "nowhere")
    report.rename(run / "hidden.json")
    try:
        assert "found no metrics.json, expected a run that has finished" in refused(run)
    finally:
        (run / "hidden.json").rename(report)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"found 'elsewhere/a\.tar', expected for --test is a path with /val/"):
        export_part.test_shards({"data": {"val": {"a": {"shards": "elsewhere/a.tar"}}}})
