"""Numbers given to constructors: what would be wrong in silence is refused by the check."""

from __future__ import annotations

import math

import pytest

from umm_zoo.errors import UserError
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.targets import find_target
from umm_zoo.experiment.types import mismatches

REFUSED = [
    ("backbones.adapters.LoRA", "rank", [0, -1]),
    ("backbones.adapters.LoRA", "alpha", [0.0, -64.0, math.inf]),
    ("methods.ross.ROSS", "weight", [-1.0, math.inf]),
    ("methods.conditioning.ConditionDropout", "text_to_image", [-0.1, 1.5]),
    ("methods.conditioning.ConditionDropout", "edit_both", [2]),
    ("methods.conditioning.Guidance", "text", [-1.0, math.inf]),
    ("methods.conditioning.Guidance", "composition", [-3.0]),
    ("methods.uae.pretraining.UAE", "drop_caption", [-0.5, 1.01]),
    ("methods.uae.rollouts.Rollouts", "updates_per_rollout", [0]),
    ("methods.uae.rollouts.Rollouts", "micro_batch", [0, -2]),
    ("methods.uae.renderers.CaptionRenderer", "guidance", [-math.inf]),
    ("methods.wemmu.WeMMU", "image_size", [0]),
    ("objectives.flow_matching.ContrastiveFlowMatching", "weight", [-0.05]),
    ("objectives.flow_matching.FlowMatching", "num_steps", [0]),
    ("objectives.flow_grpo.FlowGRPO", "clip", [-1e-4]),
    ("objectives.flow_grpo.FlowGRPO", "noise_level", [0.0]),
    ("objectives.grpo.GRPO", "clip", [-0.2]),
    ("objectives.grpo.GRPO", "kl_weight", [-1e-6, math.inf]),
    ("objectives.grpo.ConstantLength", "length", [0]),
    ("objectives.times.LogitNormalTimes", "deviation", [-1.0]),
    ("objectives.times.LogitNormalTimes", "mean", [math.inf, -math.inf]),
    ("objectives.advantages.BatchStandardised", "bound", [0.0, -5.0]),
    ("pretraining.self_supervised.MaskedImageModelling", "mask_ratio", [1.5]),
    ("pretraining.autoencoder.Autoencoder", "kl_weight", [-1e-6]),
    ("pretraining.text_to_image.TextToImage", "drop_text", [-0.1]),
    ("callbacks.rollouts.CollapseGuard", "patience", [0]),
    ("callbacks.samples.SampleGrid", "num_samples", [-1]),
    ("blocks.denoisers.DenoiserHead", "heads", [0, -4]),
    ("training.ema.EMA", "decay", [-0.1, 1.0]),
]


@pytest.mark.parametrize(("name", "argument", "value"), [(*case[:2], value) for case in REFUSED for value in case[2]])
def test_a_number_outside_of_its_limits_is_one_line(name: str, argument: str, value: float) -> None:
    hint = find_target(f"umm_zoo.{name}").hints[argument]
    (problem,) = mismatches(value, hint, argument)
    assert problem.where == argument and problem.found == str(value) and "number" in problem.expected
    assert " from " in problem.expected or " above " in problem.expected or " below " in problem.expected


def test_limits_leave_other_kinds_of_values_their_line() -> None:
    hint = find_target("umm_zoo.methods.uae.rollouts.Rollouts").hints["micro_batch"]
    assert mismatches(None, hint, "x") == [] and mismatches(1, hint, "x") == []
    (problem,) = mismatches("many", hint, "x")
    assert problem.expected == "a whole number or null"


@pytest.mark.parametrize(
    ("file", "override", "expected"),
    [
        ("clip", "encoder.config.text_config.num_attention_heads=5", "found 5, expected a divisor of hidden_size, 64"),
        ("llava", "vlm.language_model.num_attention_heads=5", "found 5, expected a divisor of hidden_size, 96"),
        ("ssl1", "encoder.config.num_attention_heads=0", "found 0, expected 1 or more"),
        ("deit", "tower.config.num_attention_heads=5", "expected a divisor of hidden_size"),
        ("llava", "vlm.language_model.num_key_value_heads=3", "found 3, expected a divisor of num_attention_heads, 4"),
        ("sana", "decoder.config.num_attention_heads=5", "expected num_attention_heads x attention_head_dim, 80"),
        ("sd3", "decoder.config.attention_head_dim=5", "expected num_attention_heads x attention_head_dim, 20"),
    ],
)
def test_heads_that_do_not_divide_are_one_line(file: str, override: str, expected: str) -> None:
    with pytest.raises(UserError) as error:
        load_experiment(f"experiments/tiny/{file}.yaml", [f"method.{override}"])
    (line,) = error.value.lines()
    assert "method." in line and expected in line
