"""ROSS on a tiny LLaVA: which states condition the head, where gradients go, what the reductions count, drawing."""

from __future__ import annotations

import pytest
import tiny_configs
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from umm_zoo.backbones.codecs import KLCodec
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.batch import Batch, Tokens, stacked
from umm_zoo.blocks.denoisers import AttentionRegressionHead, Denoiser, DenoiserHead, MLPRegressionHead, RegressionHead
from umm_zoo.blocks.targets import CodecLatents, PixelPatches, PixelsThroughCodec, ReconstructionTarget, TeacherFeatures
from umm_zoo.blocks.token_head import TokenMLPHead
from umm_zoo.experiment.build import build as build_node
from umm_zoo.methods.llava import LLaVA
from umm_zoo.methods.ross import ROSS
from umm_zoo.objectives.base import Objective
from umm_zoo.objectives.gaussian import GaussianNoisePrediction
from umm_zoo.objectives.reduction import MeanOverImages, Reduction, ReleasedReduction
from umm_zoo.objectives.regression import MeanSquaredError, NegativeCosine
from umm_zoo.outputs import Wanted

TOWER = tiny_configs.clip(image_size=12)
DECODER = tiny_configs.llama(num_key_value_heads=1, initializer_range=0.3)
CODEC = tiny_configs.codec(2, scaling_factor=0.3611, shift_factor=0.1159)
EVERYTHING = ["projector", "language_model", "head"]


def codec() -> KLCodec:
    return KLCodec.from_config(CODEC)


def backbone() -> LlavaBackbone:
    return LlavaBackbone.from_config({"vision_config": TOWER, "text_config": DECODER})


def build(
    target: ReconstructionTarget | None = None,
    head: Denoiser | RegressionHead | None = None,
    objective: Objective | None = None,
    trained: list[str] = EVERYTHING,
    reduction: Reduction | None = None,
    awake: bool = True,
) -> ROSS:
    torch.manual_seed(0)
    head = head or DenoiserHead(24, 3, 8, width=32, depth=2)
    if awake:  # with the zero-initialised tensors as they are, nothing but the output layer has a gradient
        with torch.no_grad():
            for tensor in head.parameters():
                tensor.copy_(torch.randn_like(tensor) * 0.2)
    target = target or CodecLatents(codec(), 3)
    objective = objective or GaussianNoisePrediction(num_draws=2, sampling_steps=3, first_index=998)
    method = ROSS(backbone(), target, head, objective, reduction=reduction)
    method.train_only(trained)
    return method


VARIANTS = {
    "r-pixel": lambda: (PixelPatches(3, 4), MLPRegressionHead(24, 48), MeanSquaredError()),
    "r-latent": lambda: (CodecLatents(codec(), 3, sampled=False), AttentionRegressionHead(24, 3, 8, 32, 2), MeanSquaredError()),
    "r-teacher": lambda: (
        TeacherFeatures(CLIPVisionFeatures.from_config({k: v for k, v in TOWER.items() if k != "model_type"}), 3),
        MLPRegressionHead(24, 16),
        NegativeCosine(),
    ),
    "r-latent2pixel": lambda: (PixelsThroughCodec(codec(), 3), MLPRegressionHead(24, 8), MeanSquaredError()),
    "d": lambda: (CodecLatents(codec(), 3), DenoiserHead(24, 3, 8, 32, 2), GaussianNoisePrediction(2, sampling_steps=3)),
}


def batch(counts: tuple[int, ...] = (1, 2, 0), seed: int = 1, answer: str = "red") -> Batch:
    images = torch.rand(sum(counts), 3, 12, 12, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    conversations = [
        [{"role": "user", "text": "<image>" * count + "\nWhich colour?"}, {"role": "assistant", "text": answer}] for count in counts
    ]
    keys = [f"row{i}" for i in range(len(counts))]
    return Batch(keys, conversations, images if len(images) else None, list(counts))


def reconstruction(method: ROSS, rows: Batch, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return method.training_losses(rows)["reconstruction_loss"]


def reached(method: ROSS) -> set[str]:
    """Parts of which every trainable tensor has a finite, non-zero gradient; parts with some of them are an error."""
    found = set()
    for name, part in method.parts().items():
        touched = [p.grad is not None and bool(p.grad.any()) for p in part.parameters() if p.requires_grad]
        if any(touched):
            found.add(name)
    return found


def test_terms_add_up_with_the_weight():
    method = build()
    method.weight = 0.3
    losses = method.training_losses(batch())
    assert_close(losses["loss"], losses["language_loss"] + 0.3 * losses["reconstruction_loss"])
    assert method.token_counts["text"].computed > method.token_counts["text"].useful > method.token_counts["image"].useful > 0


def test_states_at_the_image_tokens_unshifted_and_normalised():
    method = build()
    hidden = torch.arange(14.0)[None, :, None] * torch.tensor([1.0, 2, 3, 4])  # [1, 14, 4]
    hidden = hidden + torch.tensor([1.0, 2, 3, 4]) ** 2
    mask = torch.zeros(1, 14, dtype=torch.bool)
    mask[0, 3:12] = True
    expected = hidden[:, 3:12]
    centred = expected - expected.mean(-1, keepdim=True)
    assert_close(method.image_states(hidden, mask), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    small = 1e-3 * expected  # so small that the constant under the root counts
    centred = small - small.mean(-1, keepdim=True)
    assert_close(method.image_states(1e-3 * hidden, mask), centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    one = method.image_states(torch.tensor([1.0, 2, 3, 4]).expand(1, 9, 4), torch.ones(1, 9, dtype=torch.bool))
    assert_close(one[0, 0], torch.tensor([-1.3416, -0.4472, 0.4472, 1.3416]), atol=1e-4, rtol=0)


def test_condition_is_what_enters_the_output_layer(monkeypatch):
    method, rows, seen = build(), batch(), []

    def spy(head: object, latents: Tensor, condition: Tokens, generator: object) -> Tensor:
        seen.append(condition.values)
        return condition.values[None, :, 0, 0]

    monkeypatch.setattr(method.objective, "losses", spy)
    method.training_losses(rows)
    inputs = method.vlm.inputs_of(rows)
    hidden = method.vlm(inputs).hidden
    second = inputs.image_mask[1].nonzero()[:, 0]
    assert seen[0].shape == (3, 9, 24)
    assert_close(seen[0][2], nn.functional.layer_norm(hidden[1, second[9:]], (24,)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_what_is_trained_and_nothing_frozen(variant):
    method = build(*VARIANTS[variant]())
    before = {k: v.clone() for k, v in method.state_dict().items()}
    reconstruction(method, batch()).backward()
    assert reached(method) == {"projector", "language_model", "head"}
    decoder = method.vlm.language_model
    assert decoder.lm_head.weight.grad is None or decoder.lm_head.weight is decoder.model.embed_tokens.weight
    assert all(p.grad is not None and p.grad.any() for p in decoder.model.norm.parameters())
    assert all(p.grad is None for name in ("vision_tower", "target") for p in method.parts()[name].parameters())
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1).step()
    for name, tensor in method.state_dict().items():
        if name.startswith(("target.", "vlm.vision_tower.")):
            assert torch.equal(tensor, before[name])


def test_stage_one_trains_projector_and_head_only():
    method = build(trained=["projector", "head"])
    method.training_losses(batch())["loss"].backward()
    assert reached(method) == {"projector", "head"}
    assert set(method.checkpoint_keys()) == {k for k in method.state_dict() if k.startswith(("vlm.projector.", "head."))}


def test_nothing_after_an_image_is_felt_and_everything_before_is():
    method, rows = build(), batch((1,))
    inputs = method.vlm.inputs_of(rows)
    inputs.embeddings = inputs.embeddings.detach().requires_grad_()
    method.reconstruction_loss(rows, method.vlm(inputs).hidden, inputs).backward()
    touched = inputs.embeddings.grad[0].abs().sum(-1) > 0  # [L]
    last = int(inputs.image_mask[0].nonzero().max())
    assert touched[: last + 1].all() and not touched[last + 1 :].any()


def test_frozen_head_has_no_gradient_at_first_but_the_third_update_reaches_the_projector():
    method = build(awake=False)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        reconstruction(method, batch(), step).backward()
        norms.append(sum(float(p.grad.abs().sum()) for p in method.vlm.projector.parameters()))
        optimizer.step()
    assert norms[:2] == [0.0, 0.0] and norms[2] > 0


def test_rows_without_an_image_change_nothing_by_default():
    method = build(VARIANTS["r-pixel"]()[0], VARIANTS["r-pixel"]()[1], MeanSquaredError())
    alone, mixed = batch((1, 1)), batch((1, 0, 1, 0))
    assert_close(reconstruction(method, mixed), reconstruction(method, alone))


def test_released_reduction_counts_flat_images_under_a_zero_condition():
    target, head, objective = VARIANTS["r-pixel"]()
    method = build(target, head, objective, reduction=ReleasedReduction())
    rows = batch((1, 0))
    colour = 2 * torch.tensor([0.48145466, 0.4578275, 0.40821073]) - 1
    flat = colour[:, None, None].expand(3, 12, 12)
    losses = objective.losses(head, target_map(target, flat[None]), Tokens(torch.zeros(1, 9, 24)))
    method.reduction = MeanOverImages()
    image = reconstruction(method, rows)
    method.reduction = ReleasedReduction()
    assert_close(reconstruction(method, rows), (image + losses[0, 0]) / 2, rtol=2e-6, atol=0)


def target_map(target: ReconstructionTarget, images: Tensor) -> Tensor:
    return target(images).transpose(1, 2).unflatten(2, (3, 3))


@pytest.mark.parametrize("reduction", [MeanOverImages(), ReleasedReduction()])
def test_batch_without_images_runs_the_head_and_gives_zero(reduction):
    method = build(reduction=reduction)
    losses = method.training_losses(batch((0, 0)))
    assert losses["reconstruction_loss"] == 0
    losses["loss"].backward()
    for name in EVERYTHING:
        assert all(p.grad is not None for p in method.parts()[name].parameters() if p.requires_grad)
    assert all(not p.grad.any() for p in method.head.parameters())


def test_answers_do_not_need_the_head(monkeypatch):
    method, rows = build().eval(), batch((1, 1))
    baseline = LLaVA(method.vlm)
    answers = baseline.answer(rows, 5)
    for block in (method.head, method.target):
        monkeypatch.setattr(block, "forward", None)
    assert method.answer(rows, 5) == answers
    with torch.no_grad():
        assert torch.equal(method.vlm(method.vlm.inputs_of(rows)).nll, baseline.vlm(baseline.vlm.inputs_of(rows)).nll)


def test_tower_and_codec_see_each_image_once_and_without_a_graph(monkeypatch):
    method, calls = build(), []

    def spy(name, module):
        forward = module.forward

        def counted(*args, **kwargs):
            calls.append((name, len(args[0] if args else kwargs["pixel_values"]), torch.is_grad_enabled()))
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counted)

    spy("tower", method.vlm.vision_tower)
    spy("codec", method.target.codec.model.encoder)
    method.training_losses(batch())
    assert calls == [("tower", 3, False), ("codec", 3, False)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_reconstructing(variant):
    method = build(*VARIANTS[variant]()).eval()
    if not method.target.has_images:
        with pytest.raises(ValueError, match="TeacherFeatures, expected a target that can be turned back"):
            method.reconstruct(stacked(batch().images))
        return
    images = stacked(batch().images)
    made = [stacked(method.reconstruct(images, seed=3)) for _ in range(2)]
    assert made[0].shape == images.shape and torch.equal(*made) and made[0].abs().max() <= 1
    assert stacked(method.round_trip(images)).shape == images.shape


def test_reconstructing_with_the_exact_noise_gives_the_codecs_round_trip(monkeypatch):
    method = build(objective=GaussianNoisePrediction(sampling_steps=40, first_index=998)).eval()
    method.target.sampled = False
    images = stacked(batch((1, 1)).images)
    latents, bars = target_map(method.target, images), method.objective.process.alphas_bar

    def exact(noisy: Tensor, t: Tensor, condition: Tokens) -> Tensor:
        bar = torch.tensor([bars[int(i)] for i in t], dtype=torch.float32)[:, None, None, None]
        return (noisy - bar.sqrt() * latents) / (1 - bar).sqrt()

    monkeypatch.setattr(method.head, "forward", exact)
    assert_close(method.reconstruct(images), method.round_trip(images), atol=2e-3, rtol=0)


def test_validation_gives_columns_of_the_first_image_and_the_same_noise_every_time():
    method, rows = build().eval(), batch()
    method.wanted = Wanted(num_generated_batches=1)
    with torch.no_grad():
        first, second = method.validation_step(rows, 0), method.validation_step(rows, 0)
        later = method.validation_step(rows, 1)
        assert later.columns is None and later.generated is None
    assert torch.equal(first.scalars["reconstruction_loss"], second.scalars["reconstruction_loss"])
    assert list(first.columns) == ["original", "round trip", "reconstruction"]
    assert torch.equal(first.columns["original"][1], rows.images[1]) and not first.columns["original"][2].any()
    assert len(first.answers) == 3 and first.generated is None  # the third row has no image


def test_validation_hands_out_reconstructions_with_their_originals_at_the_targets_size():
    method, rows = build(CodecLatents(codec(), 3, pack=1), DenoiserHead(24, 3, 2, 32, 1)).eval(), batch((1, 2))
    with torch.no_grad():
        found = method.validation_step(rows, 0)
    assert found.generated == found.columns["reconstruction"] and stacked(found.generated).shape == (2, 3, 6, 6)
    expected = nn.functional.interpolate(stacked(rows.images[:2]), size=(6, 6), mode="bilinear", align_corners=False)
    assert torch.equal(stacked(found.references), expected)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (DenoiserHead(16, 3, 8, 32, 1), "head.condition_dim is 16, vlm.width is 24"),
        (DenoiserHead(24, 3, 4, 32, 1), "head.channels is 4, target.channels is 8"),
        (DenoiserHead(24, 2, 8, 32, 1), "head.grid is 2, target.grid is 3"),
        (MLPRegressionHead(24, 8), "GaussianNoisePrediction cannot train a MLPRegressionHead"),
        (TokenMLPHead(24, 8, 16, 1, learned_variance=True), "cannot train a TokenMLPHead that gives a variance"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        build(head=head)


def test_target_of_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"vlm.grid is Grid\(h=3, w=3\), target.grid is \(4, 4\)"):
        build(CodecLatents(codec(), 4), DenoiserHead(24, 4, 8, 32, 1))


def test_another_backbone():
    eyes = {"intermediate_size": 20, "patch_size": 2, "window_size": 12}
    config = tiny_configs.qwen(24, [2, 2, 2], eyes, intermediate_size=32, num_hidden_layers=1) | {"tie_word_embeddings": False}
    vlm = build_node({"_target_": "umm_zoo.backbones.qwen2_5_vl.Qwen25VL.from_config", "config": config})
    method = ROSS(vlm, PixelPatches(3, 4), MLPRegressionHead(24, 48), MeanSquaredError())
    method.train_only(EVERYTHING)
    losses = method.training_losses(batch())
    losses["loss"].backward()
    assert losses["reconstruction_loss"] > 0 and "language_model" in reached(method)
    assert stacked(method.reconstruct(batch().images)).shape == (3, 3, 12, 12)
