"""Image decoders of diffusers, which know the scheduler of their release."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import Tensor

from umm_zoo.backbones.devices import send
from umm_zoo.backbones.diffusers_loading import DiffusersNetwork
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.loading import one_line
from umm_zoo.batch import Crop, Tokens
from umm_zoo.objectives.discrete import DiscreteSchedule
from umm_zoo.objectives.schedules import LibrarySchedule, ReleaseSchedule

#: Where pipelines keep their scheduler, and a decoder that was saved alone its own.
SCHEDULER_FILE = "scheduler/scheduler_config.json"


class DiffusersDecoder(DiffusersNetwork, ImageDecoder):
    """Image decoder around a network of diffusers; it samples as the pipeline does that it was loaded from.

    Attributes:
        release_scheduler: the scheduler of the network's first release.
        scheduler: that of the folder the weights came from, where it holds one.
        schedule_kind: how the pipeline calls its scheduler.
        relatives: networks of the same class that also take an image.
    """

    schedule_kind: ClassVar[type[LibrarySchedule]] = LibrarySchedule
    release_scheduler: ClassVar[Mapping[str, Any]]
    scheduler: Mapping[str, Any] | None = None
    relatives: ClassVar[str] = "inpainting or editing"

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """See ``DiffusersNetwork``: as many channels come out as go in."""
        found = config["in_channels"]
        if (made := config.get("out_channels") or found) != found:
            both = f"in_channels {found} and out_channels {made} ({cls.relatives})"
            raise ValueError(f"{cls.__name__}: found {both}, expected as many of both")

    @classmethod
    def loaded(cls, model: Any, source: str, subfolder: str | None) -> Self:
        """Reads the scheduler too."""
        decoder = cls(model)
        decoder.scheduler = read_scheduler(source, subfolder)
        return decoder

    @property
    def schedule(self) -> ReleaseSchedule:
        """See ``ImageDecoder``."""
        return self.schedule_kind(self.scheduler or self.release_scheduler, self.patch)

    @property
    def num_train_times(self) -> int:
        """What the network calls time 1."""
        return int((self.scheduler or {}).get("num_train_timesteps", 1000))

    def save(self, folder: str | Path) -> None:
        """As ``DiffusersNetwork.save``, and the scheduler, so that who loads the folder samples in the same way."""
        super().save(folder)
        if self.scheduler is not None:
            file = Path(folder) / SCHEDULER_FILE
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(dict(self.scheduler), indent=2) + "\n", encoding="utf-8")


class DiscreteDecoder(DiffusersDecoder):
    """Decoder of diffusion on discrete steps, for ``DiscreteDiffusion``; its scheduler says whether it predicts noise or v."""

    @property
    def schedule(self) -> ReleaseSchedule:
        """See ``ImageDecoder``."""
        return DiscreteSchedule(self.scheduler or self.release_scheduler)


class SizedDecoder(DiscreteDecoder):
    """Decoder that is told, in pixels, which image was cut to the one it is to make, and how.

    A subclass implements ``predict_sized``. In training the loader's ``Crop`` says so, where the method hands it on
    (``Tokens.crops``). What nobody knows, and every image that is sampled, counts as whole and in its own size, as in the
    library's pipelines.

    Reference: Podell et al., 2023, arXiv 2307.01952, section 2.2.
    """

    @abstractmethod
    def predict_sized(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None, sizes: Tensor) -> Tensor:
        """As ``predict``; sizes ``[B, 6]``: height and width of the original, top and left of the cut, height and width kept."""

    def predict(self, noisy: Tensor, time: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """See ``ImageDecoder``."""
        return self.predict_sized(noisy, time, values, mask, self.sizes(noisy, ()))

    def forward(self, noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        """Predict."""
        return self.predict_sized(*self.checked(noisy, time, condition), self.sizes(noisy, condition.crops)).to(noisy.dtype)

    def sizes(self, noisy: Tensor, crops: Sequence[Crop | None]) -> Tensor:
        """``[B, 6]`` of latents ``[B, C, h, w]``."""
        made = tuple(side * self.pixels_per_cell for side in noisy.shape[-2:])
        whole = (*made, 0, 0, *made)
        rows = [whole if crop is None else (*crop.original, *crop.offset, *crop.kept) for crop in crops or [None] * len(noisy)]
        return send(torch.tensor(rows, dtype=self.model.dtype), noisy.device)


def read_scheduler(source: str, subfolder: str | None) -> dict[str, Any] | None:
    """The ``scheduler_config.json`` of a pipeline, by the pipeline's name or folder or a network's folder in it; None: none there.

    Raises:
        FileNotFoundError: the pipeline is on the hub, and neither reached nor kept here.
        ValueError: it is no JSON object.
    """
    if (folder := Path(source)).is_dir():
        whole = folder if subfolder or (folder / SCHEDULER_FILE).is_file() else folder.resolve().parent
        file = whole / SCHEDULER_FILE
        if not file.is_file() or (whole != folder and not (whole / "model_index.json").is_file()):
            return None
    elif subfolder is None:  # the name of a network alone
        return None
    else:
        try:
            file = Path(hf_hub_download(source, SCHEDULER_FILE))
        except LocalEntryNotFoundError as error:
            raise FileNotFoundError(f"found no {SCHEDULER_FILE} of '{source}' here, expected it, or to reach the hub") from error
        except EntryNotFoundError:
            return None
    with one_line(file, "a map of a scheduler's settings"):
        return dict(json.loads(file.read_text(encoding="utf-8")).items())
