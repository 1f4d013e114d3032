"""The GPU report: parts are built without a download, results are kept, and commands are those of the comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import gpu_report as tool
from tools.benchmarks import gpu_parts, paper
from umm_zoo.experiment.check import check
from umm_zoo.experiment.file import load_experiment


def test_parts_of_a_paper_file_get_random_weights_and_few_layers() -> None:
    tower = {"depth": 32, "out_hidden_size": 2048}
    loaded = {"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_pretrained", "source": "Qwen/Qwen2.5-VL-3B-Instruct"}
    loaded |= {"config": {"vision_config": tower}, "max_pixels": 200704, "gradient_checkpointing": True}
    made = paper.with_random_weights({"vlm": loaded, "layers": [{"num_hidden_layers": 1}]}, layers=2, recompute=False)
    assert made["vlm"] == {
        "_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config",
        "config": {"vision_config": {"depth": 2, "out_hidden_size": 2048, "fullatt_block_indexes": [1]}},
        "max_pixels": 200704,
        "gradient_checkpointing": False,
    }
    assert made["layers"] == [{"num_hidden_layers": 1}]
    assert loaded["gradient_checkpointing"] and tower["depth"] == 32


@pytest.mark.parametrize(("name", "variant"), [
    (name, run) for name, own in gpu_parts.TRAININGS.items() for run in range(len(own.runs))
])  # fmt: skip
def test_every_variant_is_a_valid_experiment(name: str, variant: int) -> None:
    own = gpu_parts.TRAININGS[name]
    check(load_experiment(f"experiments/{own.file}", list(own.runs[variant][1].changes)))


def test_a_step_of_few_layers_is_measured_and_its_weights_are_not_drawn() -> None:
    with paper._NoDraws():
        layer = torch.nn.Linear(3, 2)
    assert not layer.weight.any() and not layer.bias.any()


def test_rows_of_a_bridge_draw_and_reconstruct() -> None:
    batch = paper.rows(3, 32, "bridge", words=5)
    assert batch.tasks == ["text_to_image", "reconstruct", "text_to_image"] and batch.image_counts == [0, 1, 0]
    assert len(batch.requested) == 3 and batch.conversations[0][0]["text"] == "red blue green large small"


def test_commands_are_those_of_the_comparison(tmp_path: Path) -> None:
    lines = tool.commands_of("queries-large", tmp_path).splitlines()
    assert lines[1] == f"if [ ! -e {tmp_path}/queries-large.world ]; then" and lines[-2] == "fi"
    assert lines[-1] == f"{sys.executable} -m umm_zoo.compare experiments/compare/queries-large.yaml --out {tmp_path} --jobs 8"
    for name in tool.CLAIMS:
        subprocess.run(["bash", "-n"], input=tool.commands_of(name, tmp_path), text=True, check=True)


def test_page_has_utilisation_of_both_peaks_and_failures(tmp_path: Path) -> None:
    def write(name: str, results: dict[str, Any]) -> None:
        about = {"device": "CPU, reduced depth", "commit": "c", "versions": {}}
        (tmp_path / f"{name}.json").write_text(json.dumps({**about, "results": results}))

    write("limits", {"bfloat16": {"seconds": 0.0, "gflops": 800_000.0}})
    good = {"rows": 8.0, "seconds": 0.5, "memory": 2048.0, "gflop": 200_000.0}
    write("metaquery", {"paper, 8 rows": good, "paper, 900 rows": {"failed": "OutOfMemoryError: too much"}})
    text = tool.page(tmp_path)
    assert "There is no GPU here" in text
    assert "| metaquery | paper, 8 rows | 0.5 | 16 | 2.0 | 400 | 50% | 40% |" in text
    assert "| metaquery | paper, 900 rows | OutOfMemoryError: too much |" in text


def test_a_part_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def train(name: str, device: str, done: Any, tell: Any) -> None:
        asked.append(done("one"))
        tell("one", {"seconds": 1.0})

    monkeypatch.setattr(gpu_parts, "train", train)
    for _ in range(2):
        tool.run_part("metaquery", tmp_path)
    assert asked == [False, True] and json.loads((tmp_path / "metaquery.json").read_text())["results"] == {"one": {"seconds": 1.0}}


@pytest.mark.processes
def test_a_command_has_its_seconds(tmp_path: Path) -> None:
    assert tool.run(["sleep", "60"], 1, tmp_path / "log") == "its time was up"
    assert tool.run(["bash", "-c", "echo no; exit 3"], 60, tmp_path / "log") == "stopped with exit code 3, see log"
    assert (tmp_path / "log").read_text() == "no\n"
