"""Lightning callbacks that an experiment may name."""

from umm_zoo.callbacks.metrics import MetricCallback, Validation
from umm_zoo.callbacks.samples import SampleGrid
from umm_zoo.callbacks.throughput import Throughput

__all__ = ["MetricCallback", "SampleGrid", "Throughput", "Validation"]
