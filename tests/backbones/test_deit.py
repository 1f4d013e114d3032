"""DEiT-III's weights folded into a plain ViT, against its own forward written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from umm_zoo.backbones.deit import DeiT3Features

W, P, G, DEPTH = 128, 4, 3, 2  # two heads of 64


def released(style: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, W),
        "pos_embed": (1, G * G, W),
        "patch_embed.proj.weight": (W, 3, P, P),
        "patch_embed.proj.bias": (W,),
        "norm.weight": (W,),
        "norm.bias": (W,),
        "head.weight": (7, W),
        "head.bias": (7,),
    }
    gammas = ("gamma_1", "gamma_2") if style == "authors" else ("ls1.gamma", "ls2.gamma")
    for i in range(DEPTH):
        for layer, (rows, columns) in {"attn.qkv": (3 * W, W), "attn.proj": (W, W), "mlp.fc1": (32, W), "mlp.fc2": (W, 32)}.items():
            shapes |= {f"blocks.{i}.{layer}.weight": (rows, columns), f"blocks.{i}.{layer}.bias": (rows,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", *gammas):
            shapes[f"blocks.{i}.{name}"] = (W,)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def reference(w: dict[str, Tensor], images: Tensor, gammas: tuple[str, str]) -> Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    x = F.conv2d(((images + 1) / 2 - mean) / std, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=P)
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]  # positions before the class token joins
    x = torch.cat([w["cls_token"].expand(len(x), 1, W), x], dim=1)
    for i in range(DEPTH):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (W,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).reshape(len(x), -1, 3, 2, 64).permute(2, 0, 3, 1, 4)
        y = (torch.softmax(q @ k.transpose(-1, -2) / 8, -1) @ v).transpose(1, 2).flatten(2)
        x = x + b[gammas[0]] * F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (W,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.linear(F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])), b["mlp.fc2.weight"], b["mlp.fc2.bias"])
        x = x + b[gammas[1]] * y
    return F.layer_norm(x, (W,), w["norm.weight"], w["norm.bias"], 1e-6)


@pytest.mark.parametrize(("style", "gammas"), [("authors", ("gamma_1", "gamma_2")), ("timm", ("ls1.gamma", "ls2.gamma"))])
def test_folded_weights_compute_the_same(tmp_path, style, gammas):
    weights, file = released(style), tmp_path / "weights.pth"
    torch.save({"model": weights} if style == "authors" else weights, file)
    encoder, images = DeiT3Features.from_release(file).eval(), torch.rand(2, 3, G * P, G * P) * 2 - 1
    expected = reference(weights, images, gammas)
    with torch.no_grad():
        assert_close(encoder.tokens(images), expected[:, 1:], rtol=1e-4, atol=1e-4)
        assert_close(encoder(images), expected[:, 0], rtol=1e-4, atol=1e-4)
    encoder.save(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(DeiT3Features.from_pretrained(tmp_path / "saved").tokens(images), encoder.tokens(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [("missing", r"missing, such as layers\.1\.mlp\.fc1\.bias"), ("more", r"unexpected, such as layers\.0\.x\.y")],
)
def test_other_weights_are_refused(tmp_path, change, message):
    weights = released("timm")
    if change == "missing":
        del weights["blocks.1.mlp.fc1.bias"]
    else:
        weights["blocks.0.x.y"] = torch.ones(1)
    torch.save(weights, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=message):
        DeiT3Features.from_release(tmp_path / "weights.pth")
