"""Former names in experiment files, and where they are now: for hints in messages, and for ``tools/migrate_experiment.py``."""

from __future__ import annotations

import re

from umm_zoo.errors import Problem

#: Modules and classes that experiment files named before the rooms were built.
NAMES = {
    "data_pipelines.decoding.PadToSquare": "data_pipelines.transforms.resize.PadToSquare",
    "data_pipelines.decoding.Square": "data_pipelines.transforms.resize.Square",
    "data_pipelines.decoding.Squeeze": "data_pipelines.transforms.resize.Squeeze",
    "data_pipelines.drawing": "data_pipelines.generation_tasks",
    "data_pipelines.shapes.under_described": "data_pipelines.caption_tasks",
    "data_pipelines.shards.ShardData": "data_pipelines.shards.data.ShardData",
    "data_pipelines.shards.ShardSource": "data_pipelines.shards.data.ShardSource",
    "data_pipelines.streaming": "data_pipelines.shards.streaming",
    "umm_zoo.blocks.targets.OtherPictures": "umm_zoo.blocks.targets.OtherImages",
    "umm_zoo.callbacks.EMA": "umm_zoo.training.ema.EMA",
    "umm_zoo.callbacks.ema": "umm_zoo.training.ema",
    "umm_zoo.callbacks.last": "umm_zoo.checkpoints.callback",
    "umm_zoo.methods.branches": "umm_zoo.methods.conditioning",
    "umm_zoo.methods.caption_rl": "umm_zoo.methods.uae.captioner_grpo",
    "umm_zoo.methods.decoder_rl": "umm_zoo.methods.uae.decoder_grpo",
    "umm_zoo.methods.rendering": "umm_zoo.methods.uae.renderers",
    "umm_zoo.methods.rollouts": "umm_zoo.methods.uae.rollouts",
    "umm_zoo.methods.uae.UAE": "umm_zoo.methods.uae.pretraining.UAE",
    "umm_zoo.metrics.clauses": "umm_zoo.shapes.caption_metrics",
    "umm_zoo.optimization": "umm_zoo.training.optimization",
    "umm_zoo.strategies": "umm_zoo.training.sharding",
}
#: The same for what has moved together: former room and new room below ``umm_zoo``, and names.
_MOVES = (
    ("benchmarks.judge", "benchmarks.judging.captions", "Comparison compare_captions verdict"),
    ("benchmarks.judge", "benchmarks.judging.endpoint", "EndpointJudge"),
    ("benchmarks.judge", "benchmarks.judging.judge", "Judge"),
    ("benchmarks.judge", "benchmarks.judging.local", "LocalJudge"),
    ("methods", "pretraining", "autoencoder contrastive self_supervised supervised_tower text_to_image vision_warmup"),
    ("methods.rendering", "methods.uae.readers", "AnswerStatesReader BaseTextReader TextOnlyReader"),
    ("metrics", "shapes.editing_metrics", "EditPixels EditSuccess InstructionSensitivity"),
    ("metrics", "shapes.geneval_metrics", "SceneMatch ShapesGenEval"),
)
NAMES |= {f"umm_zoo.{old}.{name}": f"umm_zoo.{new}.{name}" for old, new, names in _MOVES for name in names.split()}

#: Keys that left the method, and the keys that took their place; an empty one is not needed any more.
KEYS = {
    "method.trained": "training.trained",
    "method.optimizer": "training.optimizer",
    "method.schedule": "training.schedule",
    "method.max_new_tokens": "callbacks.validation.max_new_tokens",
    "method.num_drawn_batches": "callbacks.validation.num_generated_batches",
    "method.measure_attention": "",
    "method.measure_sensitivity": "",
    "method.picture_size": "method.image_size",
    "method.prompts": "method.dropout.prompts",
    "method.stored_latents": "",
    "method.stored_targets": "",
    "method.stored_cells": "",
    "method.draw_steps": "method.num_steps",
    "method.prompt": "method.captions.prompt",
    "method.temperature": "method.captions.temperature",
    "method.group": "method.rollouts.group",
    "method.noise": "method.rollouts.noise",
    "method.updates_per_rollout": "method.rollouts.updates_per_rollout",
    "method.micro_batch": "method.rollouts.micro_batch",
    "method.objective.sampling_shift": "method.objective.schedule.shift",
    "method.renderer.objective.sampling_shift": "method.renderer.objective.schedule.shift",
    "method.objective.shift": "method.objective.schedule.config.shift",
}

#: Classes that are no more, and what stands in their place.
GONE = {
    "umm_zoo.blocks.connectors.TransformerConnector": "it agreed with no release; MetaQuery's connector is "
    "umm_zoo.blocks.metaquery_connector.MetaQueryConnector, OpenUni's umm_zoo.blocks.openuni_connector.OpenUniConnector, and its "
    "weights fit neither",
}

_NAMES = re.compile(r"(?<![\w.])(" + "|".join(re.escape(name) for name in sorted(NAMES, key=len, reverse=True)) + r")(?!\w)")


class Moved(Problem):
    """A key or class of an earlier version; the hint says what has become of it."""


def renamed(text: str) -> str:
    """A text with every former name replaced."""
    return _NAMES.sub(lambda found: NAMES[found[1]], text)


def where_now(path: str) -> str:
    """The new place of a dotted target or key; empty where it has not moved."""
    if path in KEYS:
        return f"it is {KEYS[path]} now" if KEYS[path] else "it is not needed any more"
    return f"it is {now} now" if (now := renamed(path)) != path else ""
