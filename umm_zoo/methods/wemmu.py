"""Bridge of noisy queries on a trainable copy of the language model, which does not collapse when new tasks are added."""

from __future__ import annotations

from torch import Tensor

from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.prefix import PrefixBackbone
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.pathways import QueryPathway
from umm_zoo.blocks.queries import QuerySampler
from umm_zoo.errors import Count
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.conditioning import ConditionDropout, Guidance
from umm_zoo.objectives.decoding import DecoderObjective


class WeMMU(Bridge):
    """Bridge in which a trainable copy of the frozen language model turns noisy queries into the decoder's condition.

    The paper's blocks: ``NoisyQueries``, one per cell of the latent, drawn again at every step; ``ExpertPathway``; ``VAEDetail``;
    ``PositionMLP``; Sana and its codec. Learned queries, it argues, settle on a point that serves the tasks trained first, and copy
    their input when editing is added later; noise leaves nothing to settle. The ablations are other blocks in the same slots.

    Four stages: (1) pathway, connector and detail warm up under ``ContrastiveFlowMatching`` on reconstruction, text-to-image and
    unconditional rows, the decoder frozen; (2) the decoder joins under ``FlowMatching``; (3) single-image editing; (4) editing
    with several images. Guidance: 4.0 for text; 2.0 and 3.0 in the three-term form for edits; 3.0 for several images.

    Not published, so our choice: learning rates, task shares, dropout, sampler, the prompts of the guidance branches, and what
    stands between request and queries. See each block for its own.

    Reference: Yang et al., "WeMMU: Enhanced Bridging of Vision-Language Models and Diffusion Models via Noisy Query Tokens" (arXiv
    2512.02536). No public code exists.

    Args:
        vlm: frozen for good; Qwen2.5-VL-3B in the paper.
        queries, pathway, connector: ``NoisyQueries``, ``ExpertPathway`` and ``PositionMLP`` in the paper.
        decoder: Sana 1.6B in the paper; frozen in stage 1.
        codec: the decoder's own; images to latents and back.
        objective: ``ContrastiveFlowMatching`` in stage 1, then ``FlowMatching``.
        detail: ``VAEDetail`` in the paper; None for none.
        guidance: scales of sampling; None is the paper's.
        dropout: what training leaves out at random, and what stands in its place; None is 10 % of the words of text-to-image.
        image_size: side in pixels of what ``sample`` generates when nothing else is said.
    """

    def __init__(
        self,
        vlm: PrefixBackbone,
        queries: QuerySampler,
        pathway: QueryPathway,
        connector: Connector,
        decoder: ImageDecoder,
        codec: LatentCodec,
        objective: DecoderObjective,
        detail: DetailBranch | None = None,
        guidance: Guidance | None = None,
        dropout: ConditionDropout | None = None,
        image_size: Count = 512,
    ) -> None:
        super().__init__(vlm)
        self.queries, self.pathway, self.connector, self.detail = queries, pathway, connector, detail
        self.decoder, self.codec, self.objective = decoder, codec, objective
        self.guidance, self.dropout = guidance or Guidance(), dropout or ConditionDropout()
        self.image_size = image_size
        self.join()

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Flow matching of the target's latent, conditioned on what fresh noise made of the request."""
        targets = self.codec.target_latents(batch)
        prompt = self.encode_prompt(batch, self.dropout(batch.tasks), targets)
        groups = self.conditioned_targets(batch, prompt, targets)  # queries are drawn again at every step
        losses = self.objective.over_sizes(self.decoder, groups)
        return self.over_step(losses, "rows", len(batch))
