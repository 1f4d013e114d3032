"""Renderer of UAE's second family: the language model that writes a caption also generates the tokens of its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.base import VLMInputs
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.backbones.unified import ImageSamples, UnifiedAR
from umm_zoo.batch import IMAGE_MARKER, Images, map_by_size
from umm_zoo.errors import Count, Weight, several
from umm_zoo.methods.uae.renderers import Renderer
from umm_zoo.outputs import Sampling


class TokenRenderer(Renderer):
    """Renderer in which the language model itself generates the image, token by token (Janus): that of UAE's second family.

    A caption is read in a conversation of its own, with the caption's text and no image: the image that it describes cannot pass.
    The model is the one that writes the captions, with its adapter, so that an image changes with the policy.

    Reference: Yan et al., 2025, arXiv 2509.09666, section 2 ("UMM-2"); Chen et al., "Janus-Pro" (arXiv 2501.17811).

    Args:
        guidance: scale of classifier-free guidance; 5 in Janus's release, 1 runs no unconditional row.
        temperature: of the guided distribution.
        top_k: only that many of the likeliest tokens are drawn; None, all of them, in the release.
    """

    refuses = frozenset({"steps", "size"})

    def __init__(self, guidance: Weight = 5.0, temperature: Weight = 1.0, top_k: Count | None = None) -> None:
        super().__init__()
        self.guidance, self.temperature, self.top_k = guidance, temperature, top_k

    def parts(self) -> dict[str, nn.Module]:
        """None: what generates are the language model's own."""
        return {}

    def match(self, vlm: LibraryVLM) -> None:
        """See ``Renderer``."""
        unified(vlm)

    def prompt(self, vlm: LibraryVLM, captions: Sequence[str]) -> VLMInputs:
        """Prompts of the captions, with a gradient into the embeddings of a model that is trained."""
        several("captions", captions)
        return unified(vlm).image_prompt([caption.replace(IMAGE_MARKER, "") for caption in captions])

    @torch.no_grad()
    def draw(self, vlm: LibraryVLM, captions: Sequence[str], seeds: Sequence[int], guidance: float | None = None) -> ImageSamples:
        """Tokens of one or more images of each caption, as many as there are seeds; those of a caption next to each other."""
        scale = self.guidance if guidance is None else guidance
        return unified(vlm).sample_image(self.prompt(vlm, captions), seeds, scale, self.temperature, self.top_k)

    @torch.no_grad()
    def images(self, vlm: LibraryVLM, ids: Tensor) -> Tensor:
        """Images ``[R, 3, H, W]`` of tokens ``[R, N * D]``, in [-1, 1]."""
        return unified(vlm).images_of(ids).float()

    def generate(
        self,
        vlm: LibraryVLM,
        captions: Sequence[str],
        seeds: Sequence[int],
        images: Images | None = None,
        adapter: LoRA | None = None,
        sampling: Sampling | None = None,
    ) -> list[Tensor]:
        """See ``Renderer``; there are no steps to choose, and one size.

        Raises:
            UserError: another size than the model's.
        """
        sampling = sampling or Sampling()
        if sampling.size is not None:
            unified(vlm).assert_generates(sampling.size, "size")
        return list(self.images(vlm, self.draw(vlm, captions, seeds, sampling.guidance).ids))

    @torch.no_grad()
    def round_trip(self, vlm: LibraryVLM, images: Images) -> list[Tensor]:
        """See ``Renderer``."""
        codec = unified(vlm).codec
        return map_by_size(lambda stack: codec(stack).float(), images)


def unified(vlm: LibraryVLM) -> UnifiedAR:
    """The same model, which generates image tokens.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(vlm, UnifiedAR):
        raise ValueError(f"vlm: found a {type(vlm).__name__}, expected a model that generates image tokens, such as Janus")
    return vlm
