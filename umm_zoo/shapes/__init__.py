"""Synthetic world of coloured shapes that every paper of the zoo shares, with exact ground truth for each task.

``python -m data_pipelines.shapes OUT`` writes WebDataset shards; from Python, `World` holds how hard the world is,
`make_sample` gives sample ``index`` of a task and split as a pure function of the seed, and `render` gives the image of a scene.
"""

from umm_zoo.shapes.rendering import render
from umm_zoo.shapes.samples import SPLITS, TASKS, Sample, make_sample
from umm_zoo.shapes.scenes import Object, Scene, World, sample_scene, sample_stream

__all__ = ["SPLITS", "TASKS", "Object", "Sample", "Scene", "World", "make_sample", "render", "sample_scene", "sample_stream"]
