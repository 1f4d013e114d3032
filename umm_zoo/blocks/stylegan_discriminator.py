"""StyleGAN2's discriminator, with operations of torch alone."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.blocks.discriminators import Discriminator
from umm_zoo.errors import Count, UserError


class StyleGANDiscriminator(Discriminator):
    """Residual network that judges a whole image (Karras et al., 2020, arXiv 1912.04958), the discriminator of BSQ-ViT.

    Parameters have the names of NVIDIA's release, which BSQ-ViT's is, without labels; its filters are no tensors here. Weights are
    drawn with deviation 1 and scaled where they are used. The deviation over ``group`` images is an input of the last layers, so a
    step depends on how it is shared out.

    Shape:
        - images: ``[B, 3, image_size, image_size]``
        - output: ``[B, 1]``

    Args:
        image_size: a power of 2, 8 or more.
        base: channels times resolution, up to ``most`` channels (32768 and 512 in BSQ-ViT).
        most: see there.
        group: images whose deviation is looked at, fewer where B is no multiple; 1 leaves it 0.

    Raises:
        ValueError: ``image_size`` is no such power.
    """

    def __init__(self, image_size: Count = 256, base: Count = 32768, most: Count = 512, group: Count = 4) -> None:
        super().__init__()
        if image_size < 8 or image_size & (image_size - 1):
            raise ValueError(f"StyleGANDiscriminator.image_size: found {image_size}, expected a power of 2 of 8 or more")
        self.image_size, self.group = image_size, group
        self.sizes = [2**power for power in range(int(math.log2(image_size)), 2, -1)]
        widths = {size: min(base // size, most) for size in [*self.sizes, 4]}
        for size in self.sizes:
            block = _Block(widths[size], widths[size // 2], from_rgb=size == image_size)
            self.add_module(f"b{size}", block)
        self.b4 = _Epilogue(widths[4])

    def forward(self, images: Tensor, context: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Judge; context and time are not looked at."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            found, side = f"images of {images.shape[-2]} x {images.shape[-1]} px", self.image_size
            raise UserError("method.discriminator.image_size", found, f"{side} x {side} px, or a discriminator of patches")
        x = images
        for size in self.sizes:
            x = self.get_submodule(f"b{size}")(x)
        return self.b4(x, self.group)


class _Scaled(nn.Module):
    """Convolution, or a linear layer where ``kernel`` is 0, whose weights are scaled by the root of their inputs."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, bias: bool = True) -> None:
        super().__init__()
        self.kernel, self.gain = kernel, 1 / math.sqrt(in_dim * max(1, kernel) ** 2)
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim, *([kernel] * 2 if kernel else [])))
        self.bias = nn.Parameter(torch.zeros(out_dim)) if bias else None

    def forward(self, x: Tensor, halved: bool = False) -> Tensor:
        """Apply; ``halved`` blurs before it and takes every second place."""
        if not self.kernel:
            return F.linear(x, self.weight * self.gain, self.bias)
        pad = self.kernel // 2
        x = blurred(x, pad + 1) if halved else F.pad(x, (pad, pad, pad, pad))
        return F.conv2d(x, self.weight * self.gain, self.bias, stride=2 if halved else 1)


class _Block(nn.Module):
    """Halves the resolution."""

    def __init__(self, in_dim: int, out_dim: int, from_rgb: bool) -> None:
        super().__init__()
        self.fromrgb = _Scaled(3, in_dim, 1) if from_rgb else None
        self.conv0, self.conv1 = _Scaled(in_dim, in_dim, 3), _Scaled(in_dim, out_dim, 3)
        self.skip = _Scaled(in_dim, out_dim, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The mean of both ways, but for a factor that keeps the deviation."""
        if self.fromrgb is not None:
            x = leaky(self.fromrgb(x))
        return (self.skip(x, halved=True) + leaky(self.conv1(leaky(self.conv0(x)), halved=True))) * math.sqrt(0.5)


class _Epilogue(nn.Module):
    """From 4 x 4 places to a logit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.fc, self.out = _Scaled(width + 1, width, 3), _Scaled(16 * width, width, 0), _Scaled(width, 1, 0)

    def forward(self, x: Tensor, group: int) -> Tensor:
        """Judge."""
        x = leaky(self.conv(torch.cat([x, deviation(x, group)], dim=1)))
        return self.out(leaky(self.fc(x.flatten(1))))


def leaky(x: Tensor) -> Tensor:
    """Leaky ReLU of slope 0.2 that keeps the deviation."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


def blurred(x: Tensor, pad: int) -> Tensor:
    """Zeros put around maps, then the binomial filter (1, 3, 3, 1) both ways."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) / 8
    channels = x.shape[1]
    return F.conv2d(F.pad(x, (pad, pad, pad, pad)), (line[:, None] * line).expand(channels, 1, 4, 4), groups=channels)


def deviation(x: Tensor, group: int) -> Tensor:
    """Deviation of ``[B, C, h, w]`` over ``group`` images, its mean over channels and places as one more channel."""
    count = len(x)
    size = next(size for size in range(min(group, count), 0, -1) if count % size == 0)
    grouped = x.unflatten(0, (size, -1))  # images far apart, as in the release
    spread = (grouped - grouped.mean(dim=0)).square().mean(dim=0).add(1e-8).sqrt().mean(dim=(1, 2, 3))  # [B / size]
    return spread.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])
