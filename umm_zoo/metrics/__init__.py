"""torchmetrics metrics over what a method's ``validation_step`` returns; ``callbacks.MetricCallback`` holds them.

Each one's ``update`` takes ``(outputs, batch)`` and picks its rows by ``batch.meta``; each sums exactly over batches and ranks.
"""

from umm_zoo.metrics.answers import AnswerAccuracy, normalise
from umm_zoo.metrics.frechet import FrechetDistance
from umm_zoo.metrics.means import Means
from umm_zoo.metrics.paired import PairedAccuracy
from umm_zoo.metrics.perplexity import Perplexity
from umm_zoo.metrics.pictures import PSNR
from umm_zoo.metrics.prior import LanguagePrior
from umm_zoo.metrics.reconstruction import Reconstruction
from umm_zoo.metrics.retrieval import Retrieval
from umm_zoo.metrics.rows import RowMetric
from umm_zoo.metrics.shapes_detector import ShapesDetector
from umm_zoo.metrics.shapes_editing import EditPixels, EditSuccess, InstructionSensitivity
from umm_zoo.metrics.shapes_geneval import SceneMatch, ShapesGenEval
from umm_zoo.metrics.yes_no import YesNo

__all__ = [
    "PSNR",
    "AnswerAccuracy",
    "EditPixels",
    "EditSuccess",
    "FrechetDistance",
    "InstructionSensitivity",
    "LanguagePrior",
    "Means",
    "PairedAccuracy",
    "Perplexity",
    "Reconstruction",
    "Retrieval",
    "RowMetric",
    "SceneMatch",
    "ShapesDetector",
    "ShapesGenEval",
    "YesNo",
    "normalise",
]
