"""Bridge of learned queries in a frozen language model: the one that WeMMU argues against, and OpenUni's."""

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
from umm_zoo.methods.conditioning import ConditionDropout, Guidance, Prompts
from umm_zoo.objectives.decoding import DecoderObjective


class MetaQuery(Bridge):
    """Bridge whose frozen vision-language model runs over learned queries itself; a transformer is the connector.

    The release's blocks: ``MarkedQueries`` (256 in its configurations), ``FrozenPathway`` (causal, placed as the next words),
    ``MetaQueryConnector`` of 24 layers, Sana 1.6B, and a system prompt of its own. OpenUni is the same bridge with
    ``LearnedQueries``, ``OpenUniConnector``, no system prompt and other words (``Prompts``); experiments/metaquery/paper has both.
    The loss has one random time per image, uniform.

    Guidance as in its code: 3.0 for text, 1.5 for images in the three-term form; a part of the request is left out of every tenth
    row, images replaced by black ones. Captions are cut after 256 tokens there, not here.

    Reference: Pan et al., "Transfer between Modalities with MetaQueries" (arXiv 2504.06256); Wu et al., "OpenUni" (arXiv
    2505.23661).

    Args:
        vlm: frozen for good; LLaVA-OneVision or Qwen2.5-VL in the paper, InternVL3 in OpenUni.
        queries, connector, objective: ``MarkedQueries``, ``MetaQueryConnector`` and ``FlowMatching`` in the paper.
        pathway: ``FrozenPathway`` in the paper; it has nothing to train.
        decoder: Sana 1.6B in the paper; trained, in OpenUni from its second stage on.
        detail: not in the paper; None for none.
        guidance: scales of sampling; None is the code's.
        dropout: as in ``WeMMU``; None is a tenth of each kind, nothing in the place of words and black in the place of images, and
            no line break behind an image, as in the code.
        codec, image_size: see ``WeMMU``.
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
        self.guidance = guidance or Guidance(text=3.0, reconstruction=1.5, edit=3.0, composition=None)
        self.dropout = dropout or ConditionDropout(
            0.1, 0.1, 0.1, 0.1, 0.1, prompts=Prompts("", "", black_images=True, behind_image="")
        )
        self.image_size = image_size
        self.join()

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """Flow matching of the target's latent, conditioned on what the frozen model makes of the learned queries."""
        targets = self.codec.target_latents(batch)
        prompt = self.encode_prompt(batch, self.dropout(batch.tasks), targets)
        groups = self.conditioned_targets(batch, prompt, targets)
        losses = self.objective.over_sizes(self.decoder, groups)
        return self.over_step(losses, "rows", len(batch))
