"""``python -m data_pipelines.NAME`` works for every command under its short name, and ``--help`` waits for no library."""

from __future__ import annotations

import importlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["shapes", "image_folder", "llava_json", "blip3o", "img2dataset", "coco", "editing", "table"]
COMMANDS += ["benchmark", "overlap", "index", "inspect", "precompute"]
SCRIPT = """
import runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"data_pipelines.{name}", run_name="__main__")
    except SystemExit as left:
        assert not left.code, name
    assert "torch" not in sys.modules, f"{name} --help imports torch"
"""


@pytest.mark.processes
def test_every_command_has_its_short_name_and_help_without_torch() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *COMMANDS], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    usages = [line.split()[3] for line in done.stdout.splitlines() if line.startswith("usage: ")]
    assert usages == [f"data_pipelines.{name}" for name in COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_printed_where_output_is_not_utf_8(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"data_pipelines.{name}").parser().parse_args(["--help"])
    output.flush()
    assert left.value.code == 0 and b"usage: python -m data_pipelines" in output.buffer.getvalue()  # type: ignore[attr-defined]


def test_documents_name_no_other_command() -> None:
    root = Path(__file__).parents[2]
    texts = [path.read_text(encoding="utf-8") for folder in (root, root / "data_pipelines") for path in folder.glob("*.md")]
    assert set(re.findall(r"python -m data_pipelines\.([\w.]*\w)", "\n".join(texts))) <= set(COMMANDS)
