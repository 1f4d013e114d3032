"""Adversarial training with one optimiser: the losses of a generator and of its discriminator, in one backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from umm_zoo.errors import Count, Natural, UserError, Weight


class AdversarialLoss:
    """A discriminator that tells images from reconstructions, and a generator that is paid for deceiving it.

    Both are trained by one optimiser in the same step, where releases take turns: the generator is judged by a frozen copy of the
    discriminator, and the discriminator sees reconstructions without gradient, so one backward pass over the sum gives the
    gradients of two. Neither reaches the other's. A dropout mask, a norm's running statistics and the like are those of one
    discriminator: its copy draws what it will draw, and leaves nothing behind.

    | kind | discriminator | generator |
    |---|---|---|
    | ``hinge`` (Lim and Ye, 2017, arXiv 1705.02894) | (max(0, 1 - D(x)) + max(0, 1 + D(y))) / 2 | -D(y) |
    | ``non_saturating`` (Goodfellow et al., 2014, arXiv 1406.2661) | -log s(D(x)) - log(1 - s(D(y))) | -log s(D(y)) |
    | ``vanilla``, as BSQ-ViT's release has it | half of that | the same |

    with s the sigmoid, x an image and y a reconstruction; the mean over an image's patches, then over images.

    Before ``start`` a discriminator that is not called still gets a gradient, of zeros, for ranks wait for each other's.

    Args:
        kind: see the table.
        weight: of the generator's term (0.1 in QLIP, table 8; 0.5 in LlamaGen and Epsilon-VAE, 0.75 in DualToken and RAE).
        start: the step from which it counts: so many updates were made before it.
        lead: updates by which the discriminator begins before the generator (two epochs in RAE).
        adaptive: None leaves ``weight`` alone. Else it is multiplied by the norm of the reconstruction's gradient over that of the
            generator's term, both at the decoder's last layer (Esser et al., 2021, arXiv 2012.09841, eq. 7), no less and no more
            than these: (0, 1e4) in the paper's release and LlamaGen, (0.3, 10) in DualToken. It is taken of the micro-batch of one
            rank at a time, as in the releases.
        r1: weight of R1, half the squared gradient of D at images (Mescheder et al., 2018, arXiv 1801.04406); D of an image is the
            sum over its patches. 10 in BSQ-ViT's release.
        r1_every: it is taken at one update in so many, with as many times its weight (Karras et al., 2020, arXiv 1912.04958).

    Raises:
        ValueError: ``lead`` is more than ``start``, or ``adaptive`` no range.
    """

    def __init__(
        self,
        kind: Literal["hinge", "non_saturating", "vanilla"] = "hinge",
        weight: Weight = 0.1,
        start: Natural = 0,
        lead: Natural = 0,
        adaptive: tuple[Weight, Weight] | None = None,
        r1: Weight = 0.0,
        r1_every: Count = 16,
    ) -> None:
        if lead > start:
            raise ValueError(f"AdversarialLoss.lead: found {lead}, expected at most start ({start})")
        if adaptive is not None and not 0 <= adaptive[0] <= adaptive[1]:
            raise ValueError(f"AdversarialLoss.adaptive: found {list(adaptive)}, expected the smaller bound first")
        self.kind, self.weight, self.start, self.lead, self.adaptive = kind, weight, start, lead, adaptive
        self.r1, self.r1_every = r1, r1_every

    def terms(
        self,
        discriminator: nn.Module,
        real: Tensor,
        fake: Tensor,
        step: int,
        context: Tensor | None = None,
        time: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Means over the images of one size, ``[]`` each: ``generator``, ``discriminator`` and ``r1``, without weights.

        Args:
            discriminator: a ``Discriminator``.
            real, fake: ``[B, 3, H, W]``, images and what they were reconstructed as.
            step: updates made before this one, ``StepMeans.number`` of a method.
            context, time: for the discriminator, see there; without gradient.

        Raises:
            UserError: R1 through layers whose weights ranks share out; see also ``frozen_call``.
        """
        if self.r1 and any(isinstance(parameter, DTensor) for parameter in discriminator.parameters()):
            found = f"R1 of a {type(discriminator).__name__} whose layers ranks share out"
            hint = "or trainer.strategy.whole, in MiB, above the size of a frozen network in it"
            raise UserError("method.adversarial.r1", found, "0, or ddp", hint)  # torch would crash in the second derivative
        nothing = torch.zeros((), device=fake.device)
        told = [None if value is None else value.detach() for value in (context, time)]
        if step < self.start - self.lead:
            if step == 0:  # what it cannot judge is said now, and not after days
                with torch.no_grad():
                    frozen_call(discriminator, real, *told)
            parameters = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
            idle = torch.stack([parameter.float().sum() for parameter in parameters]).sum() * 0 if parameters else nothing
            return {"generator": nothing, "discriminator": idle, "r1": nothing}
        generator = penalty = nothing
        if step >= self.start:
            generator = self.generator_loss(frozen_call(discriminator, fake, *told)).mean()
        due = self.r1 > 0 and (step + 1) % self.r1_every == 0
        seen = real.detach().requires_grad_(due)
        of_fake = discriminator(fake.detach(), *told)  # first, as the frozen copy
        with sdpa_kernel(SDPBackend.MATH) if due else nullcontext():  # the other kernels of attention have no second derivative
            of_real = discriminator(seen, *told)
        if due:
            (slope,) = torch.autograd.grad(of_real.sum(), seen, create_graph=True)
            penalty = 0.5 * slope.float().square().flatten(1).sum(dim=1).mean()
        return {"generator": generator, "discriminator": self.discriminator_loss(of_real, of_fake).mean(), "r1": penalty}

    def total(self, terms: Mapping[str, Tensor], reconstruction: Tensor, decoder: nn.Module, step: int) -> dict[str, Tensor]:
        """The loss to be minimised.

        Args:
            terms: of ``terms``, over all images of the micro-batch.
            reconstruction: what the generator is trained on beside its judge, ``[]``.
            decoder: whose last layer is looked at, see ``last_matrix``.
            step: as there.

        Returns:
            ``loss``, and ``adversarial_weight``, by which the generator's term is in it.

        Raises:
            UserError: see ``last_matrix``.
        """
        weight = torch.full((), self.weight if step >= self.start else 0.0, device=reconstruction.device)
        if self.adaptive is not None and step >= self.start:
            weight = weight * balance(reconstruction, terms["generator"], last_matrix(decoder)).clamp(*self.adaptive)
        loss = reconstruction + weight * terms["generator"] + terms["discriminator"] + self.r1 * self.r1_every * terms["r1"]
        return {"loss": loss, "adversarial_weight": weight}

    def generator_loss(self, fake: Tensor) -> Tensor:
        """From logits of reconstructions, ``[B, ...]``, to the loss of each, ``[B]``."""
        fake = fake.float()
        return _per_image(-fake if self.kind == "hinge" else F.softplus(-fake))

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """From logits of images and of their reconstructions, ``[B, ...]``, to the loss of each pair, ``[B]``."""
        real, fake = real.float(), fake.float()
        if self.kind == "hinge":
            return 0.5 * _per_image(F.relu(1 - real) + F.relu(1 + fake))
        return (0.5 if self.kind == "vanilla" else 1.0) * _per_image(F.softplus(-real) + F.softplus(fake))


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).mean(dim=1) if values.ndim > 1 else values


def frozen_call(module: nn.Module, *inputs: Tensor | None) -> Tensor:
    """Output of a module as it is now: gradients pass to its inputs and not to its parameters, and the call leaves no trace.

    Buffers stay as they are, and random numbers drawn inside will be drawn again by whoever draws next.

    Raises:
        UserError: ranks share out the weights of layers inside, which are whole only while those compute.
    """
    held = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
    if any(isinstance(value, DTensor) for value in held.values()):
        hint = "layers in a Sequential are not shared out by themselves, those in a ModuleList are"
        raise UserError("trainer.strategy", f"a {type(module).__name__} whose layers ranks share out", "ddp", hint)
    held |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    devices = {value.device for value in inputs if value is not None and value.is_cuda}
    with torch.random.fork_rng(devices=devices):
        output: Tensor = torch.func.functional_call(module, held, inputs)
    return output


def balance(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """Norm of one loss's gradient at a weight over that of another's (plus 1e-4, as taming-transformers), ``[]``, no gradient."""
    one, other = (
        torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm() for loss in (reconstruction, adversarial)
    )
    return one / (other + 1e-4)


def last_matrix(decoder: nn.Module) -> nn.Parameter:
    """Weight of the last layer of a decoder: the last one in it of two or more dimensions.

    Raises:
        UserError: it is not trained.
    """
    found = [parameter for parameter in decoder.parameters() if parameter.ndim > 1]
    if not found or not found[-1].requires_grad:
        where, kind = "method.adversarial.adaptive", type(decoder).__name__
        raise UserError(where, f"a range, and a {kind} whose last layer is not trained", "null, or a decoder that is trained")
    return found[-1]
