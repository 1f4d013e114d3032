"""Bridge of noisy queries on a trainable copy of the language model, which does not collapse when new tasks are added."""

from __future__ import annotations

from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.conditioning import ConditionDropout, Guidance


class WeMMU(Bridge):
    """Bridge in which a trainable copy of the frozen language model turns noisy queries into the decoder's condition.

    The paper's blocks: ``NoisyQueries``, one per cell of the latent, drawn again at every step; ``ExpertPathway``; ``VAEDetail``;
    ``PositionMLP``; Sana and its codec. Learned queries, it argues, settle on a point that serves the tasks trained first, and copy
    their input when editing is added later; noise leaves nothing to settle.

    Four stages: (1) pathway, connector and detail warm up under ``ContrastiveFlowMatching`` on reconstruction, text-to-image and
    unconditional rows, the decoder frozen; (2) the decoder joins under ``FlowMatching``; (3) single-image editing; (4) editing
    with several images. Guidance: 4.0 for text; 2.0 and 3.0 in the three-term form for edits; 3.0 for several images.

    Not published, so our choice: learning rates, task shares, dropout, sampler, the prompts of the guidance branches, and what
    stands between request and queries. See each block for its own.

    Reference: Yang et al., "WeMMU: Enhanced Bridging of Vision-Language Models and Diffusion Models via Noisy Query Tokens" (arXiv
    2512.02536). No public code exists.

    Args:
        vlm: Qwen2.5-VL-3B in the paper.
        queries, pathway, connector: ``NoisyQueries``, ``ExpertPathway`` and ``PositionMLP`` in the paper.
        decoder: Sana 1.6B in the paper; frozen in stage 1.
        objective: ``ContrastiveFlowMatching`` in stage 1, then ``FlowMatching``.
        detail: ``VAEDetail`` in the paper.
        dropout: None is 10 % of the words of text-to-image.
        codec, guidance, image_size: see ``Bridge``.
    """

    paper_guidance = Guidance()
    paper_dropout = ConditionDropout()
