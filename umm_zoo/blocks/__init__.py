"""What methods are composed of: each block is one slot's choice, alone in its file's family, and swappable by a YAML."""

from umm_zoo.blocks.connectors import Connector, MLPConnector, PositionMLP, TransformerConnector
from umm_zoo.blocks.denoisers import AttentionRegressionHead, Denoiser, DenoiserHead, MLPRegressionHead, RegressionHead
from umm_zoo.blocks.details import DetailBranch, VAEDetail
from umm_zoo.blocks.pathways import ExpertPathway, FrozenPathway, QueryPathway
from umm_zoo.blocks.positions import (
    AxisTables2d,
    ConcatenatedCoordinates,
    CroppedTable2d,
    InterpolatedTable2d,
    NoPosition,
    PositionEmbedding,
    Rotary2d,
    SineCosine2d,
)
from umm_zoo.blocks.queries import (
    FrozenNoiseQueries,
    LearnedGridQueries,
    LearnedQueries,
    NoisyQueries,
    PerturbedGridQueries,
    PlacedQueries,
    QuerySampler,
    ZeroQueries,
)
from umm_zoo.blocks.targets import (
    CodecLatents,
    NormalizedPixelPatches,
    OtherImages,
    PixelPatches,
    PixelsThroughCodec,
    ReconstructionTarget,
    TeacherFeatures,
)

__all__ = [
    "AttentionRegressionHead",
    "AxisTables2d",
    "CodecLatents",
    "ConcatenatedCoordinates",
    "Connector",
    "CroppedTable2d",
    "Denoiser",
    "DenoiserHead",
    "DetailBranch",
    "ExpertPathway",
    "FrozenNoiseQueries",
    "FrozenPathway",
    "InterpolatedTable2d",
    "LearnedGridQueries",
    "LearnedQueries",
    "MLPConnector",
    "MLPRegressionHead",
    "NoPosition",
    "NoisyQueries",
    "NormalizedPixelPatches",
    "OtherImages",
    "PerturbedGridQueries",
    "PixelPatches",
    "PixelsThroughCodec",
    "PlacedQueries",
    "PositionEmbedding",
    "PositionMLP",
    "QueryPathway",
    "QuerySampler",
    "ReconstructionTarget",
    "RegressionHead",
    "Rotary2d",
    "SineCosine2d",
    "TeacherFeatures",
    "TransformerConnector",
    "VAEDetail",
    "ZeroQueries",
]
