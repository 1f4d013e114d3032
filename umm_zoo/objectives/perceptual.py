"""Perceptual distances: how unlike two images look to a frozen network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchmetrics.functional.image
from safetensors.torch import load_file
from torch import Tensor, nn

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.frozen import freeze
from umm_zoo.backbones.loading import on_meta_device, one_line
from umm_zoo.backbones.weight_files import assert_readable
from umm_zoo.errors import UserError


class PerceptualDistance(nn.Module, ABC):
    """Distance of images from those that they should look like; nothing in it is trained, and no gradient reaches the latter.

    Shape:
        - found, wanted: ``[B, 3, H, W]`` in [-1, 1]
        - output: ``[B]``
    """

    @abstractmethod
    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Compare each pair."""


class FeatureDistance(PerceptualDistance):
    """Mean squared distance of the LayerNormed patch features of an encoder (our choice, for worlds too small for LPIPS).

    Args:
        encoder: gets frozen.
    """

    def __init__(self, encoder: FeatureEncoder) -> None:
        super().__init__()
        self.encoder = freeze(encoder)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Compare each pair."""
        with torch.no_grad():
            goal = self.encoder.tokens(wanted)
        seen = self.encoder.tokens(found)
        size = seen.shape[-1:]
        return F.mse_loss(F.layer_norm(seen, size), F.layer_norm(goal, size), reduction="none").flatten(1).mean(dim=1)


class LPIPS(PerceptualDistance):
    """Weighted distance of unit features of VGG-16 behind five of its layers (Zhang et al., 2018, arXiv 1801.03924, eq. 1).

    Version 0.1 of the authors' release, ``net="vgg"``, without its dropout: at each place of a layer the squared differences of
    features of unit length, summed over channels by the release's weights; the mean over places, the sum over layers. Tensors have
    torchvision's names (``features.0.weight``) and the release's (``lin0.model.1.weight``).

    Args:
        vgg: file of VGG-16's weights, ``.pth`` or ``.safetensors``, as torchvision's ``vgg16-397923af.pth`` or timm's
            ``vgg16.tv_in1k``; its classifier is not read.
        linear: file of the weights of channels, the release's ``weights/v0.1/vgg.pth``; None takes the copy in torchmetrics.

    Raises:
        FileNotFoundError: nothing there.
        UserError: a file holds other weights, or images have fewer than 16 px on a side.
    """

    widths = (64, 128, 256, 512, 512)
    convolutions = (2, 2, 3, 3, 3)  #: before each of the five outputs, each with a ReLU behind it
    shift: Tensor
    scale: Tensor

    def __init__(self, vgg: str | Path, linear: str | Path | None = None) -> None:
        super().__init__()
        layers, before = list[nn.Module](), 3
        for width, count in zip(self.widths, self.convolutions, strict=True):
            layers += [nn.MaxPool2d(2)] if layers else []
            for _ in range(count):
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
                before = width
        self.features = nn.Sequential(*layers)
        for number, width in enumerate(self.widths):
            lin = nn.Sequential(nn.Dropout(), nn.Conv2d(width, 1, 1, bias=False))  # at 1, as in the release
            self.add_module(f"lin{number}", nn.ModuleDict({"model": lin}))
        # of pixels in [-1, 1]: ImageNet's mean and deviation, as the release rounds them
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)
        if not on_meta_device():
            beside = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / "vgg.pth"
            self._read(vgg, "features.")
            self._read(beside if linear is None else linear, "lin")
        freeze(self)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Compare each pair."""
        if min(found.shape[-2:]) < 16:
            raise UserError("", f"images of {found.shape[-2]} x {found.shape[-1]} px for LPIPS", "16 px or more")
        with torch.no_grad():
            goals = list(self.outputs(wanted))
        distances = []
        for number, (one, other) in enumerate(zip(self.outputs(found), goals, strict=True)):
            weights: Tensor = self.get_submodule(f"lin{number}.model.1").weight  # type: ignore[assignment]
            squares = (unit(one) - unit(other)).square() * weights.float()[:, :, 0, 0, None, None].flatten(0, 1)
            distances.append(squares.sum(dim=1).mean(dim=(1, 2)))
        return torch.stack(distances).sum(dim=0)

    def outputs(self, images: Tensor) -> Iterator[Tensor]:
        """Behind relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, ``[B, C, h, w]``."""
        x = ((images - self.shift) / self.scale).to(next(self.features.parameters()).dtype)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
        yield x

    def _read(self, file: str | Path, prefix: str) -> None:
        """Fill the tensors whose names begin so."""
        if not Path(file).is_file():
            raise FileNotFoundError(f"found '{file}', expected a file of weights for LPIPS")
        assert_readable(file)
        with one_line(file, "a file of weights"):
            stored: Any = load_file(file) if str(file).endswith(".safetensors") else torch.load(file, "cpu", weights_only=True)
        own = {name: value for name, value in self.state_dict().items() if name.startswith(prefix)}
        for name, value in own.items():
            there = stored.get(name) if isinstance(stored, dict) else None
            if not isinstance(there, Tensor) or there.shape != value.shape:
                shown = f"{list(there.shape)}" if isinstance(there, Tensor) else "nothing"
                network = "VGG-16 without batch norms" if prefix == "features." else "LPIPS's VGG"
                raise UserError(file, f"{shown} for '{name}'", f"{list(value.shape)}, as in {network}")
            value.copy_(there)


def unit(features: Tensor) -> Tensor:
    """Features over their length along the channels, in float32 or more; those of length 0 stay 0, and have no gradient."""
    features = features if features.dtype == torch.float64 else features.float()
    return features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
