"""Lightning callbacks that an experiment may name."""

from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.callbacks.samples import SampleGrid
from umm_zoo.callbacks.throughput import Throughput
from umm_zoo.checkpoints.ema import EMA

__all__ = ["EMA", "MetricCallback", "SampleGrid", "Throughput"]
