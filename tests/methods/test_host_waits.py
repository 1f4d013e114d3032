"""No training step waits for the device: lengths, places and grids are known on the host before anything is sent."""

import pytest
import torch
from host_waits import step_unread, unsynchronised

from tests.methods import bagel_parts, bridge_parts, janus_parts, test_llava_method, test_ross, uae_parts
from tests.methods.bridge_parts import requests, tiny_vlm
from umm_zoo.batch import Batch
from umm_zoo.methods.llava import LLaVA
from umm_zoo.objectives.reduction import ReleasedReduction


def talk(question, answer):
    return [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]


def on_qwen():
    """Rows of unequal lengths, with images whose windows are ragged; the tower learns too."""
    own = LLaVA(tiny_vlm())
    own.train_only(["vision_tower", "projector", "language_model"])
    rows = [talk("<image>\nDescribe.", "a red circle"), talk("Say yes.", "yes"), talk("<image><image> Which?", "the second one")]
    return own, Batch(["a", "b", "c"], rows, [torch.rand(3, *size) for size in ((32, 32), (24, 40), (32, 32))], [1, 0, 2])


def ross(variant, counts, **settings):
    return test_ross.build(*test_ross.VARIANTS[variant](), **settings), test_ross.batch(counts)


CASES = {
    "LLaVA": lambda: (test_llava_method.method(["projector", "language_model"]), test_llava_method.batch_of(["red", "green"])),
    "LLaVA on Qwen2.5-VL": on_qwen,
    "ROSS-D": lambda: ross("d", (1, 2, 0)),
    "ROSS-D, released reduction": lambda: ross("d", (0, 1), reduction=ReleasedReduction()),
    "ROSS-R": lambda: ross("r-latent", (1, 2, 0)),
    "ROSS-R, a teacher": lambda: ross("r-teacher", (1, 1)),
    "WeMMU": lambda: (bridge_parts.wemmu(), requests(0, 1, 2)),
    "WeMMU, no image": lambda: (bridge_parts.wemmu(), requests(0, 0)),
    "MetaQuery": lambda: (bridge_parts.metaquery(), requests(0, 1, 2)),
    "UAE": lambda: (uae_parts.first_stage(), uae_parts.batch()),
    "Bagel": lambda: (bagel_parts.method(), bagel_parts.rows()),
    "Janus": lambda: (janus_parts.method(), janus_parts.rows()),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_read_off_the_device(name):
    step_unread(*CASES[name]())


@pytest.mark.parametrize(
    "read",
    [
        lambda losses: losses["loss"].item(),
        lambda losses: losses["loss"] > 0 or None,
        lambda losses: losses["loss"][None].nonzero(),
        lambda losses: losses["loss"].cpu(),
        lambda losses: torch.tensor([1.0], device=losses["loss"].device),
        lambda losses: torch.ones(2).to(losses["loss"].device),
    ],
    ids=["item", "truth", "nonzero", "cpu", "numbers", "copy"],
)
def test_whatever_is_read_raises(read):
    own, batch = CASES["LLaVA"]()
    before = own.training_losses

    def losses(batch):
        made = before(batch)
        read(made)
        return made

    own.training_losses = losses
    with pytest.raises((RuntimeError, NotImplementedError)):
        step_unread(own, batch)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_is_not_waited_for(name):
    own, batch = CASES[name]()
    own, batch = own.to("cuda").train(), batch.to("cuda")
    own.training_losses(batch)["loss"].backward()  # handles of libraries are made the first time
    with unsynchronised():
        own.training_losses(batch)["loss"].backward()
