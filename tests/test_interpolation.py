"""References to keys, which are filled in without OmegaConf, mean what OmegaConf says they do."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from umm_zoo.errors import UserError
from umm_zoo.experiment import interpolation
from umm_zoo.experiment.interpolation import interpolated

VARS = {
    "size": 24, "rate": 1e-05, "name": "a-b", "on": True, "nothing": None, "key": "size", "path": "sizes.24gb", "dollar": "$",
    "sizes": {"24gb": {"width": 8, "deep": ["${vars.size}", {"x": "${vars.name}"}]}}, "chosen": "${vars.sizes.24gb}",
    "back": "a\\b", "list": [1, "${vars.size}"], "1": "digit", "a-b": 5, "a-": 6, "-x": 7, "sïze": 8, "empty": "",
    "through": "${vars.chosen.width}",
}  # fmt: skip
TEXTS = [
    "${vars.size}", "${vars.rate}", "${vars.nothing}", "${vars.sizes}", "${vars.chosen}", "${vars.list}", "${vars.through}",
    "${vars.chosen.width}", "a ${vars.size}/${vars.name} b", " ${vars.name} ", "'${vars.name}'", "$${vars.size}", "${vars.size}}",
    "{${vars.size}}", "${vars.${vars.key}}", "${vars.sizes.${vars.name}}", "${vars.sizes.${vars.size}gb.width}", "${ vars.size }",
    "${vars.${vars.path}.width}", "x${vars.rate}", "x${vars.on}", "x${vars.nothing}", "x${vars.sizes}", "${vars.list.1}",
    "${vars.list[1]}", "${vars.1}", "${.other}", "${..vars.size}", "${oc.select:vars.size,3}", "\\${vars.size}",
    "a\\b ${vars.size}",
    "${vars.dollar}{vars.size}", "${vars.back}x", "${vars.missing}", "${vars.size.deeper}", "${vars}", "${",
    "${}", "???", "${node.given}", "${node.text}", "${null}", "$ {vars.size}", "${vars.size:3}", "${vars.size\n}", "${vars.sïze}",
    "${vars.a-b}", "${vars.a-}", "${vars.-x}", "${vars.${vars.name}}", "${vars.${vars.empty}}", "${vars.size${vars.empty}}",
    "${a-b}",
    "${${vars.empty}vars.size}", "${${vars.empty}.vars.size}", "${vars.${vars.empty}.size}", "${vars.${vars.1}}",
    "${vars.${vars.nothing}}",
    "${oc.select:${vars.key}}", "${oc.select:vars.${vars.key}}", "${oc.env:${vars.name},3}", "${oc.decode:'${vars.size}'}",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_becomes_what_omegaconf_makes_of_it(text: str) -> None:
    tree: dict[str, Any] = {"vars": VARS, "node": {"text": text, "other": 3, "given": "x"}}
    try:
        expected = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except Exception:
        with pytest.raises(UserError):
            interpolated(tree, "f.yaml")
    else:
        found = interpolated(tree, "f.yaml")
        assert found == expected and repr(found) == repr(expected)


def test_plain_references_never_reach_omegaconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpolation, "OmegaConf", None)
    tree: dict[str, Any] = {"vars": {"24gb": {"width": 8}, "size": "24gb"}}
    tree["data"] = ["x/${vars.size}", {"width": "${vars.${vars.size}.width}"}]
    assert interpolated(tree, "f.yaml")["data"] == ["x/24gb", {"width": 8}]


def test_what_is_filled_in_shares_nothing_with_its_source() -> None:
    tree = {"vars": {"list": [1]}, "data": "${vars.list}"}
    found = interpolated(tree, "f.yaml")
    found["data"].append(2)
    assert found["vars"]["list"] == tree["vars"]["list"] == [1]  # type: ignore[index]
