"""Every use of every checkpoint that is called proven."""

import copy
from dataclasses import replace

import pytest
import torch
from bridge_parts import metaquery, requests, wemmu
from library_checkpoints import checkpoint, wrapped
from uae_parts import PROMPT, Redness, renderer

from umm_zoo.backbones.adapters import LoRA
from umm_zoo.backbones.pretrained_vlm import PretrainedVLM
from umm_zoo.backbones.vlm_uses import GRID_SETTINGS, proven
from umm_zoo.batch import Batch
from umm_zoo.blocks.connectors import MLPConnector
from umm_zoo.blocks.details import VAEDetail
from umm_zoo.errors import UserError
from umm_zoo.methods.llava import LLaVA
from umm_zoo.methods.uae.captioner_grpo import GenerationForUnderstanding
from umm_zoo.methods.uae.captions import CaptionSampling
from umm_zoo.methods.uae.rollouts import Rollouts
from umm_zoo.objectives.grpo import GRPO


def of_all_sizes(batch):
    """The batch with images of unequal sizes."""
    sizes = [(20, 30), (9, 12), (33, 17)]
    generator = torch.Generator().manual_seed(3)
    return replace(batch, images=[torch.rand(3, *sizes[i], generator=generator) * 2 - 1 for i in range(len(batch.images))])


def step(method, batch):
    """One step of all that is trained; the parts with a gradient, and those that changed."""
    method.train()
    before = {name: copy.deepcopy(part.state_dict()) for name, part in method.parts().items()}
    method.training_losses(batch)["loss"].backward()
    reached = {name for name, part in method.parts().items() if any(p.grad is not None and p.grad.any() for p in part.parameters())}
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1).step()
    changed = {
        name
        for name, part in method.parts().items()
        if any(not new.equal(before[name][key]) for key, new in part.state_dict().items())
    }
    return reached, changed


def assert_bridge_learns(method, trained):
    batch = of_all_sizes(requests(1, 2, 0))
    answers = method.answer(batch, 4)
    assert step(method, batch) == (trained, trained)
    assert method.eval().answer(batch, 4) == answers
    image = method.sample(["a red circle", "<image> in green"], [[], [batch.images[0]]], size=(8, 8))
    assert image.shape == (2, 3, 8, 8) and image.isfinite().all()


@pytest.mark.parametrize("kind", proven("llava"))
def test_llava(kind):
    method = LLaVA(wrapped(kind))
    method.train_only(["projector", "language_model"])
    batch = of_all_sizes(requests(1, 2, 0))
    rows = [[*turns, {"role": "assistant", "text": "yes"}] for turns in batch.conversations]
    batch = Batch(batch.keys, rows, batch.images, batch.image_counts)
    assert method.units(batch)["tokens"] == int(method.vlm(method.vlm.inputs_of(batch)).num_tokens.sum())
    assert step(method, batch) == ({"projector", "language_model"},) * 2
    method.train_only(["projector"])
    method.zero_grad()
    method.training_losses(batch.select([2]))["loss"].backward()  # no image: ranks wait for the same gradients
    assert all(parameter.grad is not None for parameter in method.parts()["projector"].parameters())


@pytest.mark.parametrize("kind", proven("uae"))
def test_captioner(kind):
    own = renderer()
    own.connector = MLPConnector(32, 20, 28)
    method = GenerationForUnderstanding(
        vlm=wrapped(kind),
        renderer=own,
        captions=CaptionSampling(PROMPT, max_new_tokens=4),
        adapter=LoRA(rank=2, alpha=4.0),
        objective=GRPO(kl_weight=0.0),
        reward=Redness(),
        rollouts=Rollouts(group=3),
    )
    method.train_only(["adapter"])
    rows = [[{"role": "user", "text": PROMPT}, {"role": "assistant", "text": "a circle"}]] * 2
    batch = of_all_sizes(Batch(["a", "b"], rows, [torch.zeros(3, 8, 8)] * 2, [1, 1]))
    assert step(method, batch) == ({"adapter"},) * 2
    assert len(method.answer(batch, 3)) == 2


@pytest.mark.parametrize("kind", proven("frozen"))
def test_frozen_pathway(kind):
    assert_bridge_learns(metaquery(vlm=wrapped(kind)), {"queries", "connector", "decoder"})


@pytest.mark.parametrize("kind", proven("expert"))
def test_expert_pathway(kind):
    assert_bridge_learns(wemmu(["pathway", "connector"], vlm=wrapped(kind), detail=None), {"pathway", "connector"})


@pytest.mark.parametrize("kind", proven("detail"))
def test_detail(kind):
    settings = GRID_SETTINGS.get(kind)
    vlm = PretrainedVLM.from_pretrained(str(checkpoint(kind)), image_processor=settings) if settings else wrapped(kind)
    method = wemmu(vlm=vlm, detail=VAEDetail(2, 32))
    trained = {"pathway", "connector", "detail"}
    assert step(method, of_all_sizes(requests(1, 2, 0))) == (trained, trained)


def test_details_of_tiles_are_refused():
    method = wemmu(vlm=wrapped("internvl"), detail=VAEDetail(2, 32))
    with pytest.raises(UserError, match=r"no grid of tokens, but tiles.*detail: null"):
        method.training_losses(of_all_sizes(requests(1)))
