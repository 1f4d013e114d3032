"""Former names in experiment files, and where they are now: for hints in messages, and for ``tools/migrate_experiment.py``."""

from __future__ import annotations

import re

from umm_zoo.errors import Problem

#: Modules and classes that experiment files named before the rooms were built.
NAMES = {
    "data_pipelines.drawing": "data_pipelines.generation_tasks",
    "data_pipelines.shapes.under_described": "data_pipelines.caption_tasks",
    "data_pipelines.shards.ShardData": "data_pipelines.shards.data.ShardData",
    "data_pipelines.shards.ShardSource": "data_pipelines.shards.data.ShardSource",
    "data_pipelines.streaming": "data_pipelines.shards.streaming",
    "umm_zoo.blocks.targets.OtherPictures": "umm_zoo.blocks.targets.OtherImages",
    "umm_zoo.callbacks.EMA": "umm_zoo.training.ema.EMA",
    "umm_zoo.callbacks.ema": "umm_zoo.training.ema",
    "umm_zoo.callbacks.last": "umm_zoo.checkpoints.callback",
    "umm_zoo.methods.autoencoder": "umm_zoo.pretraining.autoencoder",
    "umm_zoo.methods.branches": "umm_zoo.methods.conditioning",
    "umm_zoo.methods.caption_rl": "umm_zoo.methods.uae.captioner_grpo",
    "umm_zoo.methods.contrastive": "umm_zoo.pretraining.contrastive",
    "umm_zoo.methods.decoder_rl": "umm_zoo.methods.uae.decoder_grpo",
    "umm_zoo.methods.rendering": "umm_zoo.methods.uae.renderers",
    "umm_zoo.methods.rendering.AnswerStatesReader": "umm_zoo.methods.uae.readers.AnswerStatesReader",
    "umm_zoo.methods.rendering.BaseTextReader": "umm_zoo.methods.uae.readers.BaseTextReader",
    "umm_zoo.methods.rendering.TextOnlyReader": "umm_zoo.methods.uae.readers.TextOnlyReader",
    "umm_zoo.methods.rollouts": "umm_zoo.methods.uae.rollouts",
    "umm_zoo.methods.self_supervised": "umm_zoo.pretraining.self_supervised",
    "umm_zoo.methods.supervised_tower": "umm_zoo.pretraining.supervised_tower",
    "umm_zoo.methods.text_to_image": "umm_zoo.pretraining.text_to_image",
    "umm_zoo.methods.uae.UAE": "umm_zoo.methods.uae.pretraining.UAE",
    "umm_zoo.methods.vision_warmup": "umm_zoo.pretraining.vision_warmup",
    "umm_zoo.metrics.EditPixels": "umm_zoo.shapes.editing_metrics.EditPixels",
    "umm_zoo.metrics.EditSuccess": "umm_zoo.shapes.editing_metrics.EditSuccess",
    "umm_zoo.metrics.InstructionSensitivity": "umm_zoo.shapes.editing_metrics.InstructionSensitivity",
    "umm_zoo.metrics.SceneMatch": "umm_zoo.shapes.geneval_metrics.SceneMatch",
    "umm_zoo.metrics.ShapesGenEval": "umm_zoo.shapes.geneval_metrics.ShapesGenEval",
    "umm_zoo.metrics.clauses": "umm_zoo.shapes.caption_metrics",
    "umm_zoo.optimization": "umm_zoo.training.optimization",
    "umm_zoo.strategies": "umm_zoo.training.sharding",
}

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
