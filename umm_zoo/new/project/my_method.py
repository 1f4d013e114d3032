"""A method: a LightningModule that receives built blocks, and says what is minimised."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.base import VLMBackbone
from umm_zoo.batch import Batch
from umm_zoo.blocks.denoisers import RegressionHead
from umm_zoo.methods.llava import LLaVA


class ColourLLaVA(LLaVA):
    """LLaVA whose hidden states at the image tokens must also tell the mean colour of the image.

    Args:
        vlm: the model; every image takes the same number of tokens.
        head: from the mean of those states to red, green and blue.
        weight: of the second loss.
    """

    def __init__(self, vlm: VLMBackbone, head: RegressionHead, weight: float = 1.0) -> None:
        super().__init__(vlm)
        self.head, self.weight = head, weight

    def parts(self) -> dict[str, nn.Module]:
        """Those of the backbone, and ``head``: what ``training.trained`` may name."""
        return {**super().parts(), "head": self.head}

    def training_losses(self, batch: Batch) -> dict[str, Tensor]:
        """``loss``, which is minimised, and what else is logged."""
        inputs = self.vlm.inputs_of(batch)
        output = self.vlm(inputs)
        language = output.loss * self.share("tokens", output.num_tokens.sum())  # the mean over the whole optimiser step
        images = len(batch.images)
        states = output.hidden[inputs.image_mask].unflatten(0, (images, -1)).mean(1)  # [M, D]
        colours = torch.stack([image.mean((1, 2)) for image in batch.images])  # [M, 3]
        colour = F.mse_loss(self.head.regress(states), colours) * self.share("images", images)
        return {"loss": language + self.weight * colour, "language_loss": language, "colour_loss": colour}

    def units(self, batch: Batch) -> dict[str, float]:
        """What the means above are over."""
        return {**super().units(batch), "images": len(batch.images)}
