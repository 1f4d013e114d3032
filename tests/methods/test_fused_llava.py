"""LLaVA with a codec's latents beside its tower: counts of tokens, places, gradients, and that nothing changes without."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_configs
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Batch
from umm_zoo.blocks.bottlenecks import LinearProjection, MLPProjection
from umm_zoo.blocks.fusion import DetailOnly, LengthFusion, WidthFusion
from umm_zoo.errors import UserError
from umm_zoo.methods.llava import LLaVA
from umm_zoo.training.optimization import AdamW, Constant
from umm_zoo.training.setup import TrainingSetup

CHANNELS = 3


class MeanCodec(LatentCodec):
    """Mean colour of each cell, by a layer that has weights."""

    def __init__(self, downsampling: int) -> None:
        super().__init__(CHANNELS, downsampling, 1.0, 0.0)
        self.model = torch.nn.Conv2d(3, CHANNELS, downsampling, downsampling)
        torch.nn.init.constant_(self.model.weight, downsampling**-2)

    def posterior(self, images: Tensor) -> tuple[Tensor, None]:
        return self.model(images), None

    def expand(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


def backbone(side: int = 8) -> LlavaBackbone:
    torch.manual_seed(0)
    vision = {**tiny_configs.clip(), "image_size": side, "patch_size": 4}
    config = {"vision_config": vision, "text_config": tiny_configs.llama(), "vision_feature_layer": -2}
    return LlavaBackbone.from_config(config)


VISION, TEXT = tiny_configs.clip()["hidden_size"], tiny_configs.llama()["hidden_size"]
FUSIONS: dict[str, Any] = {
    "width": lambda seen=VISION: WidthFusion(MLPProjection(seen + CHANNELS, TEXT), CHANNELS),
    "length": lambda seen=VISION: LengthFusion(LinearProjection(seen, TEXT), LinearProjection(CHANNELS, TEXT)),
    "detail": lambda seen=VISION: DetailOnly(LinearProjection(CHANNELS, TEXT)),
}


def batch_of(side: int, count: int = 2) -> Batch:
    rows = [[{"role": "user", "text": "<image>\nWhat is it?"}, {"role": "assistant", "text": "red"}] for _ in range(count)]
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Batch([str(row) for row in range(count)], rows, list(images), [1] * count)


def fused(kind: str, side: int = 8, factor: int = 4) -> LLaVA:
    vlm = backbone(side)
    torch.manual_seed(1)
    return LLaVA(vlm, codec=MeanCodec(factor), fusion=FUSIONS[kind](VISION * (factor // 4) ** 2))


@pytest.mark.parametrize(
    ("kind", "side", "factor", "count", "grid"),
    [
        ("width", 8, 4, 4, (2, 2)),
        ("width", 12, 4, 9, (3, 3)),
        ("width", 16, 8, 4, (2, 2)),
        ("length", 8, 4, 8, (1, 8)),
        ("length", 12, 4, 18, (1, 18)),
        ("length", 16, 8, 8, (1, 8)),
        ("detail", 12, 4, 9, (3, 3)),
    ],
)
def test_tokens_of_an_image(kind: str, side: int, factor: int, count: int, grid: tuple[int, int]) -> None:
    own, batch = fused(kind, side, factor), batch_of(side)
    inputs = own.vlm.inputs_of(batch)
    assert inputs.image_mask.sum(dim=1).tolist() == [count, count]
    assert own.vlm.grid == own.vlm.image_grid(side, side) == grid
    assert own.vlm.forms_grid(side, side) == (kind != "length")
    assert own.vlm.layout_rule(side, side, 1).runs == (count,) == own.vlm.image_layout(side, side, 1).runs
    assert len(own.answer(batch, 2)) == 2


@pytest.mark.parametrize(("kind", "behind"), [("width", 0), ("length", 4)])
def test_fused_tokens_are_those_of_the_formula_in_the_same_order(kind: str, behind: int) -> None:
    """Tower tokens of 4 px, cells of 8 px: the four tokens of a cell stand beside each other, row by row."""
    own, images = fused(kind, 16, 8), batch_of(16).images
    vlm: Any = own.vlm
    tower = vlm.tower_features(vlm.normalise(torch.stack(images))).unflatten(1, (4, 4))
    found = torch.stack(vlm.encode_images(images))
    for row, column in ((0, 1), (1, 0)):
        cell = tower[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
        pixels = torch.stack(images)[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        latent = pixels.sum(dim=(1, 2, 3))[:, None] / 64 + vlm.codec.model.bias
        place = 2 * row + column
        if kind == "width":
            expected = vlm.projector.adapter(torch.cat([cell, latent], dim=1))
        else:
            expected = vlm.projector.detail(latent)
            assert_close(found[:, place], vlm.projector.understanding(cell))
        assert_close(found[:, behind + place], expected)


def test_without_a_fusion_weights_and_tokens_are_the_librarys(tmp_path: Any) -> None:
    vlm = backbone()
    own, images = LLaVA(vlm), batch_of(8).images
    expected = vlm._whole[0].model.multi_modal_projector(vlm.tower_features(vlm.normalise(torch.stack(images))))
    assert torch.equal(torch.stack(vlm.encode_images(images)), expected)
    assert set(own.parts()) == {"vision_tower", "projector", "language_model"}
    assert not [key for key in own.state_dict() if "codec" in key or "fusion" in key]
    vlm.save(tmp_path)
    assert torch.equal(torch.stack(LlavaBackbone.from_pretrained(str(tmp_path)).encode_images(images)), expected)


@pytest.mark.parametrize("kind", FUSIONS)
def test_the_fusion_learns_and_tower_and_codec_do_not(kind: str) -> None:
    own = fused(kind)
    TrainingSetup(["projector"], AdamW(lr=1e-2), Constant()).prepare(own)
    own.train().training_losses(batch_of(8))["loss"].backward()
    reached = {name for name, own in own.named_parameters() if own.grad is not None and own.grad.abs().sum() > 0}
    assert reached == {f"vlm.projector.{name}" for name, _ in own.vlm.parts()["projector"].named_parameters()}
    assert {key.split(".")[1] for key in own.checkpoint_keys()} == {"projector"} and not own.vlm.codec.training
    state = {key: own.state_dict()[key] + 1 for key in own.checkpoint_keys()}
    again = fused(kind)
    again.load_weights(state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in state.items())


def test_a_row_without_an_image_reaches_the_fusion() -> None:
    own = fused("width")
    TrainingSetup(["projector"], AdamW(lr=1e-2), Constant()).prepare(own)
    rows = [[{"role": "user", "text": "What?"}, {"role": "assistant", "text": "red"}]]
    own.training_losses(Batch(["a"], rows, [], [0]))["loss"].backward()
    assert all(parameter.grad is not None for parameter in own.vlm.parts()["projector"].parameters())


@pytest.mark.parametrize(
    ("side", "factor", "fusion", "message"),
    [
        (12, 6, FUSIONS["width"], "a codec with 2 x 2 cells beside a tower with 3 x 3 tokens at 12 px"),
        (8, 2, FUSIONS["width"], "a codec with 4 x 4 cells beside a tower with 2 x 2 tokens at 8 px"),
        (12, 5, FUSIONS["width"], "12 x 12 px"),
        (12, 12, FUSIONS["length"], f"expected {9 * VISION} (3 x 3 tokens of the tower in a cell)"),
        (8, 4, lambda: DetailOnly(LinearProjection(2, TEXT)), "method.fusion.detail_dim: found 2, expected 3"),
        (8, 4, lambda: DetailOnly(LinearProjection(CHANNELS, 7)), "method.fusion.width: found 7, expected 24"),
        (8, 4, lambda: None, "a codec without a fusion"),
        (8, None, FUSIONS["width"], "a fusion without a codec"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(side: int, factor: int | None, fusion: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        LLaVA(backbone(side), codec=None if factor is None else MeanCodec(factor), fusion=fusion())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_a_place_for_it_is_refused() -> None:
    with torch.device("meta"):
        vlm = Qwen25VL.from_config(tiny_configs.qwen(32, [2, 3, 3]))
        with pytest.raises(UserError, match="a fusion for a Qwen25VL, which takes none"):
            LLaVA(vlm, codec=MeanCodec(4), fusion=FUSIONS["width"]())


def test_what_the_library_has_no_format_for_is_not_written(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="a LLaVA with a WidthFusion, for which the library has no format"):
        fused("width").vlm.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_codec_is_never_trained() -> None:
    with pytest.raises(UserError, match="'codec', which no loss reaches"):
        fused("width").train_only(["projector", "codec"])


@pytest.mark.parametrize("kind", FUSIONS)
def test_stored_latents_give_the_same_loss_and_call_no_codec(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, batch = fused(kind), batch_of(8)
    [(name, item)] = method.precomputable().items()
    assert item.per == "image" and item.part is method.vlm.parts()["codec"] and not item.compute(batch.select([])).numel()
    expected, latents = method.training_losses(batch)["loss"], item.compute(batch)
    assert latents.shape == (2, CHANNELS, 2, 2) and not latents.requires_grad
    monkeypatch.setattr(MeanCodec, "posterior", None)
    batch.extras = {name: latents}
    assert_close(method.training_losses(batch)["loss"], expected)
    batch.extras = {name: latents + 1}
    assert not torch.allclose(method.training_losses(batch)["loss"], expected)
    batch.extras = {name: latents[:1]}
    with pytest.raises(UserError, match=r"1 latents of \[2, 2\] cells, expected 2 of \[2, 2\], one per image"):
        method.training_losses(batch)


def test_a_llava_without_a_codec_stores_nothing() -> None:
    assert LLaVA(backbone()).precomputable() == {}
