"""torchmetrics metrics over what a method's ``validation_step`` makes; ``callbacks.MetricCallback`` holds them.

Each one's ``update`` takes ``(outputs, batch)`` and picks its rows by ``batch.meta``; each sums exactly over batches and ranks.
``reads`` names what it needs of ``Outputs``, so that a method that does not make it is refused before a run.
"""

from umm_zoo.metrics.answers import AnswerAccuracy, normalise
from umm_zoo.metrics.captions import BLEU, CIDEr
from umm_zoo.metrics.codes import CodeUsage
from umm_zoo.metrics.frechet import FrechetDistance
from umm_zoo.metrics.images import PSNR, HighBandEnergy, Reconstruction
from umm_zoo.metrics.means import AttentionBias, Means
from umm_zoo.metrics.paired import PairedAccuracy
from umm_zoo.metrics.perplexity import Perplexity
from umm_zoo.metrics.prior import LanguagePrior
from umm_zoo.metrics.retrieval import EncodedRetrieval, Retrieval
from umm_zoo.metrics.rows import RowMetric
from umm_zoo.metrics.yes_no import POPE, YesNo

__all__ = [
    "BLEU",
    "POPE",
    "PSNR",
    "AnswerAccuracy",
    "AttentionBias",
    "CIDEr",
    "CodeUsage",
    "EncodedRetrieval",
    "FrechetDistance",
    "HighBandEnergy",
    "LanguagePrior",
    "Means",
    "PairedAccuracy",
    "Perplexity",
    "Reconstruction",
    "Retrieval",
    "RowMetric",
    "YesNo",
    "normalise",
]
