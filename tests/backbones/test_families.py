"""The matrix of checkpoints: every row is one that the tests of its columns run over."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from decoder_parts import DECODERS
from test_library_codecs import CODECS

from umm_zoo.backbones import families
from umm_zoo.backbones.families import Family

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("rows", "uses", "tested"),
    [
        (families.DECODERS, families.DECODER_USES, {kind for kind, _, _ in DECODERS.values()}),
        (families.CODECS, families.CODEC_USES, {kind for kind, *_ in CODECS.values()}),
    ],
)
def test_a_row_is_tested_under_every_column(rows: Sequence[Family], uses: Mapping[str, str], tested: Collection[Any]) -> None:
    readers = {}
    for row in rows:
        module, _, name = row.reader.rpartition(".")
        readers[getattr(importlib.import_module(module), name)] = row.stored
    assert {kind: kind.kind.__name__ for kind in tested} == readers
    for proof in uses.values():
        file, _, test = proof.partition("::")
        text = (HERE / file).read_text(encoding="utf-8")
        assert re.search(rf"(@every_\w+|parametrize\(.name., DECODERS\))(\n@.*)*\ndef {test}\(", text), proof


def test_a_wrong_folder_is_told_every_class_that_reads_it() -> None:
    two = families.use("UNet2DConditionModel")
    assert two.startswith("; use umm_zoo.") and ".StableDiffusion or umm_zoo." in two and two.endswith(".StableDiffusionXL")
    assert families.use("Nothing2DModel") == "" == families.use(None)
