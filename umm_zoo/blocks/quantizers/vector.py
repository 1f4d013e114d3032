"""Quantizers that look a latent up in a table of codes: vector quantization, and SimVQ."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.blocks.quantizers.base import MOST_BITS, Quantized, Quantizer, entropy, straight_through
from umm_zoo.errors import Count, Positive, Weight

#: Distances that a search holds at a time: 256 MiB of them.
_DISTANCES = 2**26


@torch.no_grad()
def nearest(latents: Tensor, book: Tensor) -> Tensor:
    """Number of the nearest code of each latent, ``[M]``, for latents ``[M, d]`` and codes ``[K, d]``.

    In float32 at least, whatever the precision of training: in bfloat16 several percent of the codes would be others.
    """
    with torch.autocast("cpu" if latents.is_meta else latents.device.type, enabled=False):  # torch knows none of "meta"
        wide = torch.promote_types(book.dtype, torch.float32)
        book = book.to(wide)
        half = book.square().sum(dim=1) / 2  # |z - e|^2 is least where z e - |e|^2 / 2 is most
        parts = latents.to(wide).split(max(1, _DISTANCES // len(book)))
        return torch.cat([(part @ book.T - half).argmax(dim=1) for part in parts])


class BookQuantizer(Quantizer):
    """Base of quantizers with a table of codes, one code per token.

    Args:
        dim: d.
        size: K, at most 2^16.
        normalised: codes and latents are taken as unit vectors, and those go on.

    Raises:
        ValueError: a table that is too large.
    """

    codes_per_token = 1

    def __init__(self, dim: Count, size: Count, normalised: bool) -> None:
        super().__init__()
        if size > 2**MOST_BITS:
            raise ValueError(f"{type(self).__name__}.size: found {size}, expected at most {2**MOST_BITS}")
        self.dim, self.num_codes, self.normalised, self.keeps_length = dim, size, normalised, not normalised
        self.bits = math.log2(size)

    @abstractmethod
    def table(self) -> Tensor:
        """The codes ``[K, d]`` as they are."""

    def book(self) -> Tensor:
        """The codes ``[K, d]`` that latents are compared with."""
        return F.normalize(self.table(), dim=-1) if self.normalised else self.table()

    def values_of(self, codes: Tensor) -> Tensor:
        """See the base class."""
        return F.embedding(codes[..., 0], self.book())

    def look_up(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents as they are compared, codes ``[B, N, 1]`` and their values, with the gradient of the table."""
        latents = F.normalize(latents, dim=-1) if self.normalised else latents
        book = self.book()
        codes = nearest(latents.flatten(0, -2), book).unflatten(0, latents.shape[:-1])[..., None]
        return latents, codes, F.embedding(codes[..., 0], book)


class VectorQuantizer(BookQuantizer):
    """Vector quantization: the nearest of K codes that are learned (van den Oord et al., 2017, arXiv 1711.00937).

    ``losses``: ``codebook``, mean squared distance of codes to latents, which moves the codes; ``commitment``, the same number,
    which moves the latents; with ``entropy`` also LlamaGen's entropy term, which costs K probabilities per token.

    Args:
        dim: d.
        size: K.
        normalised: unit vectors, as in LlamaGen and Janus (Sun et al., 2024, arXiv 2406.06525).
        commitment, codebook: weights of the two terms.
        entropy: weight of ``E[H(p)] - H(E[p])`` with p the softmax of minus the squared distances over ``temperature``.
        temperature: of that softmax (the release's).

    Raises:
        ValueError: a table that is too large.
    """

    def __init__(
        self,
        dim: Count,
        size: Count,
        normalised: bool = True,
        commitment: Weight = 0.25,
        codebook: Weight = 1.0,
        entropy: Weight = 0.0,
        temperature: Positive = 0.01,
    ) -> None:
        super().__init__(dim, size, normalised)
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        self.weights = {"codebook": codebook, "commitment": commitment, "entropy": entropy}
        self.temperature = temperature

    def table(self) -> Tensor:
        """See the base class."""
        return self.embedding.weight

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        latents, codes, values = self.look_up(latents)
        found = Quantized(straight_through(latents, values), codes)
        if self.training:
            found.losses = book_losses(latents, values)
            if self.weights["entropy"]:
                found.losses["entropy"] = self._entropy(latents)
            found.losses["loss"] = weighted(found.losses, self.weights)
        return found

    def _entropy(self, latents: Tensor) -> Tensor:
        flat, book = latents.flatten(0, -2).float(), self.book().float()
        logits = (2 * flat @ book.T - book.square().sum(dim=1) - flat.square().sum(dim=1, keepdim=True)) / self.temperature
        logs = logits.log_softmax(dim=1)
        return -(logs.exp() * logs).sum(dim=1).mean() - entropy(logs.exp().mean(dim=0))


class SimVQuantizer(BookQuantizer):
    """SimVQ: codes are one learned linear map of a fixed random table, so that every code moves in every step.

    Reference: Zhu et al., 2024, arXiv 2411.02038. Tensors have the names of its release, which forgets the map where it decodes
    from numbers.

    Args:
        dim: d.
        size: K.
        basis_dim: width of the fixed table; None is ``dim``.
        bias: of the map; the release has one.
        commitment, codebook: see ``VectorQuantizer``.

    Raises:
        ValueError: a table that is too large.
    """

    def __init__(
        self,
        dim: Count,
        size: Count,
        basis_dim: Count | None = None,
        bias: bool = True,
        commitment: Weight = 0.25,
        codebook: Weight = 1.0,
    ) -> None:
        super().__init__(dim, size, normalised=False)
        basis_dim = basis_dim or dim
        self.embedding = nn.Module()  # a buffer, for a part that is trained must not train it
        self.embedding.register_buffer("weight", torch.randn(size, basis_dim) * basis_dim**-0.5)
        self.embedding_proj = nn.Linear(basis_dim, dim, bias=bias)
        self.weights = {"codebook": codebook, "commitment": commitment}

    def table(self) -> Tensor:
        """See the base class."""
        basis: Tensor = self.embedding.get_buffer("weight")
        table: Tensor = self.embedding_proj(basis)
        return table

    def forward(self, latents: Tensor) -> Quantized:
        """See the base class."""
        latents, codes, values = self.look_up(latents)
        found = Quantized(straight_through(latents, values), codes)
        if self.training:
            found.losses = book_losses(latents, values)
            found.losses["loss"] = weighted(found.losses, self.weights)
        return found


def book_losses(latents: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The two terms of vector quantization, means over all elements, in float32."""
    latents, values = latents.float(), values.float()
    return {"codebook": F.mse_loss(values, latents.detach()), "commitment": F.mse_loss(latents, values.detach())}


def weighted(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Weighted sum of losses, ``[]``; those without a weight do not count."""
    return torch.stack([weights[name] * value for name, value in losses.items() if name in weights]).sum()
