"""Lightning callbacks that an experiment may name."""

from umm_zoo.callbacks.metrics import MetricCallback
from umm_zoo.callbacks.samples import SampleGrid
from umm_zoo.callbacks.throughput import Throughput
from umm_zoo.callbacks.validation import Validation

__all__ = ["MetricCallback", "SampleGrid", "Throughput", "Validation"]
