"""Bridge of learned queries in a frozen language model: the one that WeMMU argues against, and OpenUni's."""

from __future__ import annotations

from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.conditioning import ConditionDropout, Guidance, Prompts


class MetaQuery(Bridge):
    """Bridge whose frozen vision-language model runs over learned queries itself; a transformer is the connector.

    The paper's blocks: ``LearnedQueries`` (256 in its configurations), ``FrozenPathway`` (causal, placed as the next words),
    ``TransformerConnector`` of 24 layers, Sana 1.6B. OpenUni is the same bridge with a connector of 6 layers. The loss has
    one random time per image, uniform.

    Guidance as in its code: 3.0 for text, 1.5 for images in the three-term form; a part of the request is left out of every tenth
    row, images replaced by black ones.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256); Wu et al., "OpenUni" (arXiv
    2505.23661).

    Args:
        vlm: LLaVA-OneVision or Qwen2.5-VL in the paper, InternVL3 in OpenUni.
        queries, connector, objective: ``LearnedQueries``, ``TransformerConnector`` and ``FlowMatching`` in the paper.
        pathway: ``FrozenPathway`` in the paper; it has nothing to train.
        decoder: Sana 1.6B in the paper; trained, in OpenUni from its second stage on.
        detail: not in the paper.
        guidance: None is the code's.
        dropout: None is a tenth of each kind, nothing in the place of words and black in the place of images, as in the code.
        codec, image_size: see ``Bridge``.
    """

    paper_guidance = Guidance(text=3.0, reconstruction=1.5, edit=3.0, composition=None)
    paper_dropout = ConditionDropout(0.1, 0.1, 0.1, 0.1, 0.1, prompts=Prompts("", "", black_images=True))
