"""Quantizers: latents of tokens to a few integers each, and the values that stand for those."""

from umm_zoo.blocks.quantizers.averaged import EMAQuantizer
from umm_zoo.blocks.quantizers.base import NoQuantizer, Quantized, Quantizer
from umm_zoo.blocks.quantizers.binary import BinaryQuantizer
from umm_zoo.blocks.quantizers.residual import ResidualQuantizer
from umm_zoo.blocks.quantizers.scalar import FiniteScalarQuantizer
from umm_zoo.blocks.quantizers.vector import SimVQuantizer, VectorQuantizer

__all__ = [
    "BinaryQuantizer",
    "EMAQuantizer",
    "FiniteScalarQuantizer",
    "NoQuantizer",
    "Quantized",
    "Quantizer",
    "ResidualQuantizer",
    "SimVQuantizer",
    "VectorQuantizer",
]
