"""GenEval with its detectors, and in miniature."""

from umm_zoo.benchmarks.geneval.benchmark import GenEval
from umm_zoo.benchmarks.geneval.colours import AttributeNamer, CLIPColours
from umm_zoo.benchmarks.geneval.detector import Detector
from umm_zoo.benchmarks.geneval.mask2former import Mask2Former
from umm_zoo.benchmarks.geneval.onnx_detector import ONNXDetector
from umm_zoo.benchmarks.geneval.shapes import MiniGenEval

__all__ = ["AttributeNamer", "CLIPColours", "Detector", "GenEval", "Mask2Former", "MiniGenEval", "ONNXDetector"]
