"""A frozen model's reading of a batch of requests, with the detail tokens of their images, ready for queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.prefix import Prefix, PrefixBackbone
from umm_zoo.batch import Batch, Grid, Tokens
from umm_zoo.blocks.details import DetailBranch
from umm_zoo.blocks.pathways import QueryPathway


@dataclass
class Reading:
    """What queries go on from: a cached prompt and K detail tokens (0 without a detail branch).

    Shape:
        - image_mask: ``[B, L]`` bool, True at the vision tower's tokens
        - details: ``[B, K, D]``, zeros on padding
        - detail_positions: ``[3, B, K]``, those of the vision tower's tokens of the same places
        - detail_blocks: ``[B, K]``, which image of the row a token belongs to, -1 on padding
        - unused: scalar zero that depends on the detail branch where no image does; ranks must touch the same parameters
    """

    context: Tokens
    prefix: Prefix
    image_mask: Tensor
    details: Tensor
    detail_positions: Tensor
    detail_blocks: Tensor
    unused: Tensor | None = None

    @property
    def num_details(self) -> int:
        """K."""
        return self.details.shape[1]

    @property
    def detail_mask(self) -> Tensor:
        """``[B, K]`` bool, False on padding."""
        return self.detail_blocks >= 0

    def with_queries(
        self, pathway: QueryPathway, vlm: PrefixBackbone, queries: Tensor, grid: Grid
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``[details | queries]`` with their position ids and who may attend to whom; all may attend to the whole prompt.

        Detail tokens see all of their own image and of those before it, and no query; queries see every detail token, and each
        other as the pathway says.

        Returns:
            tokens ``[B, K+N, D]``, positions ``[3, B, K+N]``, mask ``[B, K+N, K+N]``.
        """
        if self.unused is not None:
            queries = queries + self.unused.to(queries.dtype)
        dtype = torch.promote_types(self.details.dtype, queries.dtype)
        tokens = torch.cat([self.details.to(dtype), queries.to(dtype)], dim=1)
        positions = torch.cat([self.detail_positions, pathway.positions(vlm, self.prefix, grid)], dim=-1)
        size, count = queries.shape[:2]
        blocks, real = self.detail_blocks, self.detail_mask
        inside = (blocks[:, :, None] >= blocks[:, None]) & real[:, None]  # [B, K, K]
        inside |= torch.eye(self.num_details, dtype=torch.bool, device=inside.device)  # padding sees something, itself
        upper = torch.cat([inside, inside.new_zeros(size, self.num_details, count)], dim=-1)
        among = pathway.among(count, inside.device).expand(size, -1, -1)
        lower = torch.cat([real[:, None].expand(-1, count, -1), among], dim=-1)
        return tokens, positions, torch.cat([upper, lower], dim=1)


def read(vlm: PrefixBackbone, codec: LatentCodec, detail: DetailBranch | None, batch: Batch) -> Reading:
    """Read the prompts of a batch up to the opening of an answer; only detail tokens carry a gradient.

    That the prompt ends with the opening of an assistant turn, and that nothing stands between it and the queries, is our choice.
    """
    with torch.no_grad():
        inputs = vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
        prefix = vlm.prefix(inputs)
    details, positions, blocks, unused = _details(vlm, codec, detail, batch, inputs)
    context = Tokens(inputs.embeddings, inputs.attention_mask)
    return Reading(context, prefix, inputs.image_mask, details, positions, blocks, unused)


def _details(
    vlm: PrefixBackbone, codec: LatentCodec, detail: DetailBranch | None, batch: Batch, inputs: VLMInputs
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    size, width, device = len(batch), inputs.embeddings.shape[-1], inputs.embeddings.device
    if detail is None or batch.images is None:
        unused = None
        if detail is not None:
            unused = 0 * detail(torch.zeros(1, detail.latent_channels, 1, 1, device=device)).sum()
        empty = inputs.position_ids.new_zeros(3, size, 0)
        return inputs.embeddings.new_zeros(size, 0, width), empty, empty[0], unused
    tokens = detail(aligned_latents(vlm, codec, batch.images.to(device)))  # [M, n, D]
    cells = tokens.shape[1]
    counts = torch.tensor(batch.image_counts, device=device)
    places = torch.arange(int(counts.max()) * cells, device=device).expand(size, -1)  # [B, K]
    real = places < counts[:, None] * cells
    details = tokens.new_zeros(*real.shape, width).masked_scatter(real[..., None], tokens)
    ids = inputs.position_ids[:, inputs.image_mask]  # [3, M * n]; images of a row follow each other in the prompt too
    positions = ids.new_zeros(3, *real.shape)
    positions[:, real] = ids
    return details, positions, torch.where(real, places // cells, -1), None


@torch.no_grad()
def aligned_latents(vlm: PrefixBackbone, codec: LatentCodec, images: Tensor) -> Tensor:
    """Latents ``[M, C, h, w]`` of images resized so that their grid is the vision tower's.

    At Qwen2.5-VL's 28 px per token and a codec of factor 32 an image of 28 h x 28 w is read at 32 h x 32 w.
    """
    grid = vlm.image_grid(*images.shape[-2:])
    size = (grid.h * codec.downsampling, grid.w * codec.downsampling)
    if size != tuple(images.shape[-2:]):
        images = F.interpolate(images, size=size, mode="bicubic", antialias=True).clamp(-1, 1)
    return codec.encode(images)


@torch.no_grad()
def attention_bias(
    pathway: QueryPathway, vlm: PrefixBackbone, reading: Reading, queries: Tensor, grid: Grid
) -> dict[str, Tensor | dict[str, int]]:
    """How much more queries look at the image than at the words, after WeMMU's Figure 3 (whose unit is not published).

    Mean attention that a query pays to one token of the vision tower minus that to one token of text, over queries, heads and
    layers: ``attention_bias`` of the probabilities, ``attention_log_bias`` of the logarithms of those means. Rows without an image
    do not count, and the words of the chat template count as text; a positive number is a bias to the image, that is to copying.

    Returns:
        both scalars, and ``counts`` for ``metrics.Means``.
    """
    words = reading.prefix.attention_mask & ~reading.image_mask
    rows = reading.image_mask.any(dim=1)
    counts = {"attention_bias": int(rows.sum()), "attention_log_bias": int(rows.sum())}
    zero = queries.new_zeros((), dtype=torch.float32)
    if not rows.any():
        return {"attention_bias": zero, "attention_log_bias": zero, "counts": counts}
    tokens, positions, mask = reading.with_queries(pathway, vlm, queries, grid)
    length = words.shape[1]
    raw, logs = [], []
    for weights in pathway.attention(tokens, reading.prefix, positions, mask):
        paid = weights[:, :, reading.num_details :, :length].float().mean(dim=2)  # [B, heads, L]
        image, text = (
            (paid * kind[:, None]).sum(-1) / kind.sum(-1, keepdim=True).clamp(min=1) for kind in (reading.image_mask, words)
        )  # [B, heads]
        raw.append((image - text)[rows].mean())
        logs.append((image.clamp(min=1e-12).log() - text.clamp(min=1e-12).log())[rows].mean())
    return {"attention_bias": torch.stack(raw).mean(), "attention_log_bias": torch.stack(logs).mean(), "counts": counts}
