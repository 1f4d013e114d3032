import pytest
import torch
from learning import losses_of

from umm_zoo.backbones.features import DINOv2Features, DINOv3Features
from umm_zoo.batch import Batch
from umm_zoo.method import Method
from umm_zoo.pretraining.self_supervised import MaskedImageModelling, VICReg, Views, off_diagonal_covariance, variance_hinge
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

DINO2 = {"hidden_size": 16, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
DINO3 = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4,
    "num_register_tokens": 1,
}  # fmt: skip


def batch(rows: int = 6) -> Batch:
    images = torch.rand(rows, 3, 1, 1, generator=torch.Generator().manual_seed(0)).expand(rows, 3, 8, 8) * 2 - 1
    return Batch([f"row{i}" for i in range(rows)], [[] for _ in range(rows)], images, [1] * rows)


def vicreg() -> Method:
    torch.manual_seed(0)
    return VICReg(DINOv2Features.from_config(DINO2), expander_dim=12)


def masked(kind=DINOv2Features, config=DINO2) -> Method:
    torch.manual_seed(0)
    return MaskedImageModelling(kind.from_config(config), mask_ratio=0.5)


def test_variance_hinge_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [2.0, 0.2]])  # variances 2 and 0.02
    expected = ((1 - (0.02 + 1e-4) ** 0.5) + 0.0) / 2
    torch.testing.assert_close(variance_hinge(features), torch.tensor(expected))


def test_covariance_by_hand() -> None:
    features = torch.tensor([[1.0, 2.0, 0.0], [-1.0, -2.0, 0.0]])  # covariance of the first two: 4
    torch.testing.assert_close(off_diagonal_covariance(features), torch.tensor(2 * 16.0 / 3))


def test_views_shift_without_mixing_rows() -> None:
    images = torch.arange(2.0)[:, None, None, None].expand(2, 3, 8, 8) - 0.5
    torch.testing.assert_close(Views(max_shift=2, brightness=0.0, noise=0.0, hole=0)(images), images)
    holed = Views(max_shift=0, brightness=0.0, noise=0.0, hole=3)(images)
    assert ((holed == 0).sum(dim=(1, 2, 3)) == 27).all()


def test_a_shift_moves_pixels() -> None:
    torch.manual_seed(0)
    images = torch.zeros(40, 3, 8, 8)
    images[:, :, 4, 4] = 1.0
    found = {tuple(view[0].nonzero()[0].tolist()) for view in Views(1, 0.0, 0.0, 0)(images)}
    assert found == {(y, x) for y in (3, 4, 5) for x in (3, 4, 5)}


@pytest.mark.parametrize("make", [vicreg, masked, lambda: masked(DINOv3Features, DINO3)])
def test_gradients_are_finite_and_reach_every_part(make) -> None:
    method = make()
    method.training_losses(batch())["loss"].backward()
    for name, part in method.parts().items():
        grads = [parameter.grad for parameter in part.parameters() if parameter.grad is not None]
        assert grads and all(grad.isfinite().all() for grad in grads), name


@pytest.mark.parametrize("make", [vicreg, masked, lambda: masked(DINOv3Features, DINO3)])
def test_the_loss_falls(make) -> None:
    method = make()
    TrainingSetup(list(method.parts()), AdamW(1e-3 if make is vicreg else 3e-3)).prepare(method)
    outputs = method.validation_step(batch(), 0)
    assert set(method.makes) == {*outputs.scalars, "image_features"} and outputs.image_features.shape == (6, 16)
    first = outputs.scalars["loss"].item()
    losses_of(method, batch(), 60)
    assert method.validation_step(batch(), 0).scalars["loss"].item() < 0.8 * first


def test_only_hidden_patches_are_scored() -> None:
    method = masked()
    seen = {}
    method.encoder.model.register_forward_pre_hook(lambda _, args, given: seen.update(given), with_kwargs=True)
    method.training_losses(batch())
    assert (seen["bool_masked_pos"].sum(dim=1) == 2).all()  # half of four


def test_validation_leaves_the_random_state_alone() -> None:
    method = masked().eval()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    method.validation_step(batch(), 0)
    torch.testing.assert_close(torch.rand(3), expected)


def test_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 rows or more"):
        vicreg().training_losses(batch(1))
