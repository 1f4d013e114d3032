"""setup.cfg and tools/setup.sh name what the code imports: a fresh clone has nothing else."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = configparser.ConfigParser()
OPTIONS.read(ROOT / "setup.cfg", encoding="utf-8")
#: Modules under another name than the distribution that holds them.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "pyyaml",
    "annotated_types": "annotated-types",
    "huggingface_hub": "huggingface-hub",
}
#: Declared and never imported: commands, and what a library asks for when it is used.
USED_OTHERWISE = {
    "tensorboard",
    "ruff",
    "mypy",
    "pytest-xdist",
    "setuptools",
    "torchao",
    "accelerate",
    "python-multipart",
    "openai",
}


def names(requirements: str) -> set[str]:
    return {re.split(r"[\[<>=]", line)[0].strip() for line in requirements.splitlines() if line.strip()}


#: What a user brings to be measured against: a library that pins others than we do, and the official code of a paper.
BROUGHT = {"litdata", "models"}


@cache
def imported(folder: str) -> set[str]:
    """Distributions of the modules that a folder's files import, their own and the standard library's apart."""
    files = sorted((ROOT / folder).rglob("*.py"))
    own = (
        {"umm_zoo", "data_pipelines", "tests", "tools"}
        | {file.stem for file in files}
        | {file.stem for file in (ROOT / "tools").glob("*.py")}
    )
    found: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return {DISTRIBUTIONS.get(name, name) for name in found - own - set(sys.stdlib_module_names)}


def required(*extras: str) -> set[str]:
    listed = [OPTIONS["options"]["install_requires"], *(OPTIONS["options.extras_require"][name] for name in extras)]
    return set().union(*map(names, listed))


@pytest.mark.parametrize("folder", ["umm_zoo", "data_pipelines", "tools"])
def test_imports_are_declared(folder: str) -> None:
    assert imported(folder) - required("remote", "lora", "8bit", "parquet", "trl", "onnx", "serve", "ui") - BROUGHT == set()


def test_imports_of_the_tests_are_what_setup_installs() -> None:
    [extras] = re.findall(r'-e "\.\[([a-z0-9,]+)\]"', (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8"))
    assert imported("tests") - required(*extras.split(",")) == set()


def test_nothing_is_declared_in_vain() -> None:
    used = set().union(*map(imported, ("umm_zoo", "data_pipelines", "tools", "tests")))
    assert required(*OPTIONS["options.extras_require"]) - used - USED_OTHERWISE == set()


def test_every_requirement_has_a_tested_pin() -> None:
    pins = {
        line.split("==")[0]
        for line in (ROOT / "tools" / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    }
    assert required(*OPTIONS["options.extras_require"]) - pins == set()
