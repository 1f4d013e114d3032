"""Janus's image tokens: look-ups between unit vectors, against the library where it is right; and what a training needs."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tests.backbones.janus_parts import VQ, janus, spread
from umm_zoo.backbones.janus_vq import JanusVQ
from umm_zoo.batch import Grid
from umm_zoo.errors import UserError
from umm_zoo.testing import check_block


def build() -> JanusVQ:
    vq = JanusVQ.from_config({**VQ, "num_patches": 4})
    spread(vq)
    return vq


@pytest.fixture(scope="module")
def vq():
    return build()


IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_codes_are_the_nearest_unit_vectors_and_not_the_librarys(vq):
    latents = F.normalize(vq.model.quant_conv(vq.model.encoder(IMAGES)), dim=1).flatten(2).mT  # [M, N, E]
    expected = torch.cdist(latents, F.normalize(vq.model.quantize.embedding.weight, dim=-1)[None]).argmin(-1)
    found = vq.codes(IMAGES)
    assert found.shape == (3, 16, 1) and torch.equal(found[..., 0], expected)
    theirs = vq.model.encode(IMAGES).image_tokens.view(3, 16)
    assert 0 < (theirs == expected).float().mean() < 0.9


def test_images_are_the_librarys(vq):
    codes = vq.codes(IMAGES)
    theirs = vq.model.decode(codes[..., 0])
    assert_close(vq.images(codes), theirs.clamp(-1, 1), atol=1e-5, rtol=1e-5)
    assert theirs.abs().max() > 1 and vq.images(codes).abs().max() == 1


def test_cells_of_a_wide_image_are_in_raster_order(vq):
    wide = torch.cat([IMAGES, IMAGES.flip(0)], -1)[:, :, :4]  # 4 x 16 pixels
    codes = vq.codes(wide)
    assert codes.shape == (3, 16, 1) and vq.images(codes, Grid(2, 8)).shape == (3, 3, 4, 16)
    with pytest.raises(ValueError, match="found 16 cells, expected 18, a grid of 3 x 6"):
        vq.images(codes, Grid(3, 6))
    with pytest.raises(ValueError, match="found 15 cells, expected the cells of a square"):
        vq.images(codes[:, 1:])
    with pytest.raises(UserError, match="found 8 x 7 px, expected multiples of 2 px"):
        vq.codes(IMAGES[..., 1:])


def test_a_training_reaches_every_weight_where_the_librarys_reaches_no_encoder():
    vq, theirs = build(), build()
    found = vq.reconstruct(IMAGES)
    (F.mse_loss(found.images, IMAGES) + found.regularisation()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in vq.parameters())
    F.mse_loss(theirs.model(IMAGES).decoded_pixel_values, IMAGES).backward()
    assert all(parameter.grad is None for parameter in theirs.model.encoder.parameters())


def test_terms_of_the_codebook_and_of_the_encoder(vq):
    latents = F.normalize(vq.model.quant_conv(vq.model.encoder(IMAGES)), dim=1)
    chosen = F.normalize(vq.model.quantize.embedding.weight, dim=1)[vq.codes(IMAGES)[..., 0]].mT.unflatten(2, (4, 4))
    found = vq.reconstruct(IMAGES)
    expected = (latents - chosen).square().mean()
    assert_close(found.codebook, expected)
    assert_close(found.commitment, expected)
    assert_close(found.regularisation(), 1.25 * expected)
    codes, encoder = vq.model.quantize.embedding.weight, vq.model.quant_conv.weight
    moved = [torch.autograd.grad(term, [codes, encoder], allow_unused=True) for term in (found.codebook, found.commitment)]
    assert [[grad is not None for grad in pair] for pair in moved] == [[True, False], [False, True]]


def test_the_gradient_of_an_image_passes_its_codes_unchanged(vq, monkeypatch):
    latents = vq.latents(IMAGES).detach().requires_grad_()
    monkeypatch.setattr(vq, "latents", lambda _: latents)
    vq.reconstruct(IMAGES).images.square().sum().backward()
    chosen = vq.codebook[vq.codes(IMAGES)[..., 0]].mT.unflatten(2, (4, 4)).detach().requires_grad_()
    vq.model.decoder(vq.model.post_quant_conv(chosen)).square().sum().backward()
    assert_close(latents.grad, chosen.grad, atol=1e-3, rtol=1e-4)


def test_it_learns_to_reconstruct():
    vq = build()
    optimizer, errors = torch.optim.Adam(vq.parameters(), lr=3e-3), []
    for _ in range(25):
        found = vq.reconstruct(IMAGES)
        errors.append(F.mse_loss(found.images, IMAGES))
        (errors[-1] + found.regularisation()).backward()
        optimizer.step(), optimizer.zero_grad()
    assert errors[-1] < 0.5 * errors[0]


def test_it_stays_in_evaluation_mode(vq):
    assert not any(part.training for part in vq.train().modules())
    model = janus().train()
    assert model.image_head.training and not any(part.training for part in model.codec.modules())
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())


def test_contract():
    check_block(build().requires_grad_(False), output_shape=(2, 3, 4, 6))


def test_saved_alone_and_read_from_a_whole_model(tmp_path):
    whole = janus()
    whole.save(tmp_path / "whole")
    inside = JanusVQ.from_pretrained(str(tmp_path / "whole"))
    inside.save(tmp_path / "alone")
    alone = JanusVQ.from_pretrained(str(tmp_path / "alone"), VQ)
    for found in (inside, alone):
        assert torch.equal(found.codes(IMAGES), whole.codec.codes(IMAGES))
        assert all(torch.equal(a, b) for a, b in zip(found.parameters(), whole.codec.parameters(), strict=True))
    with torch.device("meta"):
        planned = JanusVQ.from_pretrained(str(tmp_path / "whole"))
        assert sum(p.numel() for p in planned.parameters()) == sum(p.numel() for p in alone.parameters())
    with pytest.raises(ValueError, match=r"config\.num_embeddings: found 21, expected 20"):
        JanusVQ.from_pretrained(str(tmp_path / "alone"), {"num_embeddings": 21})


def test_numbers_of_channels_are_refused_before_the_library_does():
    with pytest.raises(ValueError, match=r"found base_channels \* channel_multiplier = 48, expected multiples of 32"):
        JanusVQ.from_config({**VQ, "channel_multiplier": [2, 3], "base_channels": 16, "num_patches": 4})
    with pytest.raises(ValueError, match="config: found 'codes', expected"):
        JanusVQ.from_config({"codes": 20})
