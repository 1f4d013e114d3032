"""Every method under every precision that Lightning offers, trained and validated on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from tests.methods import bridge_parts, forge_parts, test_llava_method, test_ross, uae_parts
from tests.pretraining import test_autoencoder as autoencoder
from tests.pretraining import test_contrastive as contrastive
from tests.pretraining import test_self_supervised as self_supervised
from tests.pretraining import test_supervised_tower as tower
from tests.pretraining import test_text_to_image as text_to_image
from tests.pretraining import test_vision_warmup as warmup
from umm_zoo.batch import Batch
from umm_zoo.errors import UserError
from umm_zoo.method import Method
from umm_zoo.outputs import Wanted
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

Made = tuple[Method, Batch]
COLOURS = ["red", "green", "blue"]
METHODS: dict[str, Callable[[], Made]] = {
    "llava": lambda: (test_llava_method.method(["projector", "language_model"]), test_llava_method.batch_of(COLOURS)),
    "llava-towers": lambda: (test_llava_method.method(["projector", "vision_tower"]), test_llava_method.batch_of(COLOURS)),
    "wemmu": lambda: (bridge_parts.wemmu(), bridge_parts.requests(1, 2, 0)),
    "metaquery": lambda: (bridge_parts.metaquery(), bridge_parts.requests(1, 0)),
    "forge-and-quench": lambda: (forge_parts.method(), forge_parts.rows("a red circle", "two")),
    "uae": lambda: (uae_parts.first_stage(), uae_parts.batch()),
    "uae-captioner": lambda: (uae_parts.second_stage(), uae_parts.batch()),
    "uae-decoder": lambda: (uae_parts.third_stage(), uae_parts.batch()),
    "autoencoder-kl": lambda: (autoencoder.Autoencoder(autoencoder.KLCodec.from_config(autoencoder.KL)), autoencoder.batch()),
    "autoencoder-dc": lambda: (autoencoder.Autoencoder(autoencoder.DCCodec.from_config(autoencoder.DC)), autoencoder.batch()),
    "text-to-image": lambda: (text_to_image.text_to_image(), text_to_image.batch(["a red circle", "two"])),
    "clip": lambda: (contrastive.clip(), contrastive.batch(COLOURS)),
    "siglip": lambda: (contrastive.siglip(), contrastive.batch(COLOURS)),
    "vicreg": lambda: (self_supervised.vicreg(), self_supervised.batch()),
    "masked": lambda: (self_supervised.masked(), self_supervised.batch()),
    "masked-dinov3": lambda: (
        self_supervised.masked(self_supervised.DINOv3Features, self_supervised.DINO3),
        self_supervised.batch(),
    ),
    "supervised-tower": lambda: (tower.tower(), tower.batch()),
    "vision-warmup": lambda: (warmup.warmup(), warmup.batch()),
}


def ross(variant: str) -> Callable[[], Made]:
    return lambda: (test_ross.build(*test_ross.VARIANTS[variant]()), test_ross.batch())


METHODS |= {f"ross-{variant}": ross(variant) for variant in test_ross.VARIANTS}


@pytest.mark.parametrize("precision", ["16-true", "bf16-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_and_validates(name: str, precision: Any) -> None:
    method, batch = METHODS[name]()
    trained = method.trained or [part for part in method.parts() if part != "perceptual"]
    half = precision == "16-true"
    TrainingSetup(trained, AdamW(lr=1e-4, eps=1e-4 if half else 1e-8)).prepare(method)
    method.wanted = Wanted(max_new_tokens=2)
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=2,
        limit_val_batches=1,
        check_val_every_n_epoch=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    data = DataLoader([batch, batch], batch_size=None)
    trainer.fit(method, data, data)
    losses = {key: value for key, value in trainer.callback_metrics.items() if key.startswith("train/")}
    assert losses and all(value.isfinite() for value in losses.values()), losses
    moved = [p for part in trained for p in method.parts()[part].parameters() if p.requires_grad]
    assert all(p.isfinite().all() for p in moved)
    assert {p.dtype for p in moved if p.dtype == torch.float16} == ({torch.float16} if half else set())


def test_an_eps_that_is_nothing_in_half_precision_is_refused() -> None:
    weights = {"part": [torch.nn.Parameter(torch.ones(2, dtype=torch.float16))]}
    with pytest.raises(UserError, match=r"training.optimizer.eps: found 1e-08, which is 0 in the float16 of the weights"):
        AdamW(lr=1e-4).build(weights)
    AdamW(lr=1e-4, eps=1e-4).build(weights)
