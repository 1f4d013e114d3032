"""Rewards: T15 of the specification, groups, combinations, the shuffled control, and the contract for anybody's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.feature_encoder import FeatureEncoder
from umm_zoo.backbones.features import CLIPVisionFeatures
from umm_zoo.batch import Batch, Grid, stacked
from umm_zoo.rewards import ReconstructionReward, Reward, ShuffledReward, WeightedReward
from umm_zoo.testing import check_reward


class Corner(FeatureEncoder):
    """The colour of the first pixel, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.width = self.token_width = 3
        self.num_layers, self.grid, self.image_size = 1, Grid(1, 1), 4

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0] * self.factor

    def tokens(self, images: Tensor, layer: int = -1) -> Tensor:
        return self(images)[:, None]


class Brightness(Reward):
    """The mean of the image, and nothing about the source."""

    def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
        return torch.stack([image.mean() for image in candidates])


def rows(*colours: tuple[float, float, float]) -> Batch:
    images = torch.tensor(colours)[:, :, None, None].expand(-1, 3, 4, 4).clone()
    names = [f"row{i}" for i in range(len(colours))]
    return Batch(names, [[{"role": "user", "text": "<image>"}] for _ in names], images, [1] * len(names))


RED, GREEN, GREY = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.5, 0.5)


def test_t15_same_direction_one_orthogonal_zero_and_scale_does_not_matter():
    reward = ReconstructionReward(Corner())
    assert_close(reward(stacked(rows(RED, GREEN).images), rows(RED, RED)), torch.tensor([1.0, 0.0]))
    assert_close(ReconstructionReward(Corner(7.0))(stacked(rows(GREY).images), rows(RED)), torch.tensor([3**-0.5]))
    assert_close(reward(0.2 * stacked(rows(RED).images), rows(RED)), torch.tensor([1.0]))


def test_t15_nothing_is_trained_and_the_output_is_detached():
    reward = ReconstructionReward(Corner()).train()
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.encoder.training
    assert not reward(stacked(rows(RED).images).requires_grad_(), rows(GREY)).requires_grad


def test_a_group_is_compared_with_its_own_row():
    batch = rows(RED, GREEN)
    candidates = stacked(rows(RED, GREEN, GREY, RED, GREEN, GREY).images)
    assert_close(ReconstructionReward(Corner())(candidates, batch), torch.tensor([1, 0, 3**-0.5, 0, 1, 3**-0.5]))


def test_a_target_stands_in_for_an_image():
    batch = Batch(["row"], [[{"role": "user", "text": "a red square"}]], targets=stacked(rows(RED).images))
    assert_close(ReconstructionReward(Corner())(stacked(rows(RED).images), batch), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="row: found no image"):
        ReconstructionReward(Corner())(stacked(rows(RED).images), Batch(["row"], [[]]))


def test_weighted_sum():
    both = WeightedReward({"same": ReconstructionReward(Corner()), "bright": Brightness()}, {"same": 2.0, "bright": -0.5})
    assert_close(both(stacked(rows(RED).images), rows(RED)), torch.tensor([2 - 0.5 / 3]))
    with pytest.raises(ValueError, match=r"weights are of \['sane'\]"):
        WeightedReward({"same": Brightness()}, {"sane": 1.0})


def test_shuffled_control_compares_with_the_next_row():
    batch, candidates = rows(RED, GREEN, GREY), stacked(rows(RED, GREEN, GREEN, RED, GREY, RED).images)
    source = torch.tensor([GREEN, GREEN, GREY, GREY, RED, RED])
    expected = torch.cosine_similarity(candidates[:, :, 0, 0], source)
    assert_close(ShuffledReward(ReconstructionReward(Corner()))(candidates, batch), expected)
    with pytest.raises(ValueError, match="one row"):
        ShuffledReward(Brightness())(candidates[:2], rows(RED))


def test_a_number_of_candidates_that_is_no_multiple_is_refused():
    with pytest.raises(ValueError, match="3 candidates for 2 rows"):
        Brightness()(stacked(rows(RED, RED, RED).images), rows(RED, GREEN))


@pytest.mark.parametrize("reward", [ReconstructionReward(Corner()), Brightness(), ShuffledReward(Brightness())])
def test_contract(reward: Reward):
    check_reward(reward, torch.rand(6, 3, 4, 4) * 2 - 1, rows(RED, GREEN))


def test_contract_with_a_real_encoder():
    sizes = {"hidden_size": 12, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    config = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2}
    check_reward(ReconstructionReward(CLIPVisionFeatures.from_config(config)), torch.rand(4, 3, 8, 8), rows(RED, GREEN))


def test_contract_finds_mistakes():
    class Trained(Brightness):
        """Has a weight."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

    class Ranked(Brightness):
        """Depends on the place."""

        def score(self, candidates: list[Tensor], batch: Batch) -> Tensor:
            return torch.arange(len(candidates)).float()

    for reward, message in ((Trained(), "nothing to train"), (Ranked(), "place in the group")):
        with pytest.raises(AssertionError, match=message):
            check_reward(reward, torch.rand(6, 3, 4, 4), rows(RED, GREEN))
