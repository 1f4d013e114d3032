"""An adapter of a method on one rank, and on two that share the weights out: one training, with averages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from chain_parts import chain_experiment
from nursery import Nursery

from tests.test_checkpoint_resume import AVERAGED, SHARDED
from umm_zoo.checkpoints.files import load_checkpoint

pytestmark = pytest.mark.processes


def test_an_adapter_trains_alike_sharded_and_goes_on_alone(nursery: Nursery, tmp_path: Path) -> None:
    base = chain_experiment(tmp_path)
    node = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": 2, "alpha": 4.0}
    stage = {"base": base, "adapters": {"stack": node}, "training": {"trained": ["head", "stack_adapter"]}}
    (tmp_path / "adapted.yaml").write_text(yaml.safe_dump(stage))
    argv = ["adapted.yaml", AVERAGED, "trainer.val_check_interval=3"]
    code, said = nursery.run(tmp_path, *argv, "name=whole", "trainer.max_steps=5")
    assert code == 0, said
    for number, options in ((3, [SHARDED]), (5, [])):
        more = [f"trainer.max_steps={number}", *options, *(["ckpt=last"] if number > 3 else [])]
        code, said = nursery.run_ranks(tmp_path, 2, *argv, *more) if options else nursery.run(tmp_path, *argv, *more)
        assert code == 0, said
    whole, parts = (load_checkpoint(tmp_path / "runs" / name) for name in ("whole", "adapted"))
    assert {key.split(".")[0] for key in whole["state_dict"]} == {"head", "mirror", "adapters"}
    for key, value in whole["state_dict"].items():
        torch.testing.assert_close(parts["state_dict"][key], value, atol=1e-5, rtol=1e-4)
