"""Learned queries in a frozen language model: the bridge that WeMMU argues against, and OpenUni's."""

from __future__ import annotations

from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.blocks.queries import QuerySampler
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.conditioning import ConditionDropout, Guidance, Prompts
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.training.optimization import OptimizerFactory, Schedule


class MetaQuery(Bridge):
    """A frozen vision-language model that runs over learned queries itself, a transformer as connector, a trained decoder.

    The paper's blocks: ``LearnedQueries`` (256 in its configurations), ``FrozenPathway`` (causal, placed as the next words),
    ``TransformerConnector`` of 24 layers, Sana 1.6B. OpenUni is the same bridge with a connector of 6 layers. One draw of the loss
    per image, times uniform.

    Guidance as in its code: 3.0 for text, 1.5 for images in the three-term form; a part of the request is left out of every tenth
    row, images replaced by black ones.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256); Wu et al., "OpenUni" (arXiv
    2505.23661).

    Args:
        vlm: frozen for good; LLaVA-OneVision or Qwen2.5-VL in the paper, InternVL3 in OpenUni.
        queries: ``LearnedQueries`` in the paper.
        pathway: ``FrozenPathway`` in the paper.
        connector: ``TransformerConnector`` in the paper.
        decoder: Sana 1.6B in the paper; trained, in OpenUni from its second stage on.
        codec: the decoder's own; images to latents and back.
        objective: ``FlowMatching`` in the paper.
        optimizer: builds the optimiser over the trained parts; AdamW with betas 0.9 and 0.95 in the code.
        trained: names among ``queries``, ``connector``, ``detail``, ``decoder``; the pathway has nothing to train.
        schedule: learning rate over the steps; None is constant.
        detail: not in the paper; None for none.
        guidance: scales of sampling; None is the code's.
        dropout: what training leaves out at random; None is a tenth of each kind, as in the code.
        prompts: what stands in its place; None is nothing for words and black for images.
        image_size: side in pixels of what ``sample`` draws when nothing else is said.
        num_drawn_batches: batches of each validation that are drawn; None draws all.
        measure_attention: also return how far queries look at image rather than text (costs a second pass of the pathway).
        measure_sensitivity: also draw edits as reconstructions, from the same noise (costs a second drawing).
        max_new_tokens: longest answer in validation, to rows that have one.

    Raises:
        ValueError: sizes of the blocks disagree, or a part of the vision-language model is to be trained.
    """

    def __init__(
        self,
        vlm: PrefixBackbone,
        queries: QuerySampler,
        pathway: QueryPathway,
        connector: Connector,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: FlowMatching,
        optimizer: OptimizerFactory,
        trained: list[str],
        schedule: Schedule | None = None,
        detail: DetailBranch | None = None,
        guidance: Guidance | None = None,
        dropout: ConditionDropout | None = None,
        prompts: Prompts | None = None,
        image_size: int = 512,
        num_drawn_batches: int | None = None,
        measure_attention: bool = False,
        measure_sensitivity: bool = False,
        max_new_tokens: int = 0,
    ) -> None:
        super().__init__(
            vlm,
            queries,
            pathway,
            connector,
            decoder,
            codec,
            objective,
            optimizer,
            trained,
            schedule,
            detail,
            guidance or Guidance(3.0, 1.5, 3.0, None),
            dropout or ConditionDropout(0.1, 0.1, 0.1, 0.1, 0.1),
            prompts or Prompts("", "", black_images=True),
            image_size,
            num_drawn_batches,
            measure_attention,
            measure_sensitivity,
            max_new_tokens,
        )
