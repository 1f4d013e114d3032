"""The synthetic world that every paper of the zoo shares: drawn scenes with exact ground truth for each task.

``python -m data_pipelines.shapes OUT`` writes WebDataset shards; from Python, `World` holds how hard the world is,
`make_sample` gives sample ``index`` of a task and split as a pure function of the seed, and `render` draws a scene.
"""

from data_pipelines.shapes.questions import language_prior
from data_pipelines.shapes.render import render
from data_pipelines.shapes.tasks import SPLITS, TASKS, Sample, make_sample
from data_pipelines.shapes.world import Object, Scene, World, sample_scene, sample_stream

__all__ = [
    "SPLITS",
    "TASKS",
    "Object",
    "Sample",
    "Scene",
    "World",
    "language_prior",
    "make_sample",
    "render",
    "sample_scene",
    "sample_stream",
]
