import pytest
import torch
from learning import losses_of
from tiny_configs import TEXT, VISION

from umm_zoo.backbones.features import CLIPFeatures, SigLIPFeatures
from umm_zoo.batch import Batch
from umm_zoo.objectives.contrast import SigmoidContrast, SoftmaxContrast, WordSwaps
from umm_zoo.pretraining.contrastive import Contrastive, captions
from umm_zoo.training.optimization import AdamW
from umm_zoo.training.setup import TrainingSetup

COLOURS = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


def batch(names: list[str]) -> Batch:
    images = torch.stack([torch.tensor(COLOURS[name])[:, None, None].expand(3, 8, 8) for name in names])
    conversations = [[{"role": "user", "text": "<image>"}, {"role": "assistant", "text": f"a {name} sheet"}] for name in names]
    return Batch([f"row{i}" for i in range(len(names))], conversations, images, [1] * len(names))


def clip(swaps: bool = True) -> Contrastive:
    torch.manual_seed(0)
    encoder = CLIPFeatures.from_config({"vision_config": VISION, "text_config": TEXT, "projection_dim": 8})
    return Contrastive(encoder, SoftmaxContrast(), WordSwaps([list(COLOURS)]) if swaps else None)


def siglip() -> Contrastive:
    torch.manual_seed(0)
    encoder = SigLIPFeatures.from_config({"vision_config": VISION, "text_config": TEXT})
    return Contrastive(encoder, SigmoidContrast(), WordSwaps([list(COLOURS)]))


@pytest.mark.parametrize("make", [clip, siglip])
def test_every_parameter_gets_a_gradient(make) -> None:
    method = make()
    method.training_losses(batch(["red", "green", "blue"]))["loss"].backward()
    for name, parameter in method.named_parameters():
        if "logit_bias" not in name and "k_proj.bias" not in name:  # keys' biases cancel in a softmax
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("make", [clip, siglip])
def test_it_learns_to_tell_colours_from_hard_negatives(make) -> None:
    method, data = make(), batch(["red", "green", "blue", "red"])
    TrainingSetup(["encoder"], AdamW(3e-3)).prepare(method)
    losses_of(method, data, 60)
    outputs = method.eval().validation_step(data, 0)
    assert outputs.scalars["hard_accuracy"] == 1 and outputs.counts == {"hard_accuracy": 4}
    assert set(method.makes) == {*outputs.scalars, "image_features", "text_features"}
    cosines = outputs.image_features @ outputs.text_features.T
    assert cosines.argmax(dim=1)[1:3].tolist() == [1, 2]


def test_negatives_belong_to_their_own_row() -> None:
    """With one colour that has no other words, only the rows that have swaps are scored."""
    method = clip()
    method.negatives = WordSwaps([["green", "blue"]])
    seen = {}
    method.contrast.register_forward_pre_hook(lambda _, args: seen.update(negatives=args[2], valid=args[6]))
    method.training_losses(batch(["red", "green", "blue"]))
    assert seen["valid"].tolist() == [[False], [True], [True]]
    wanted = torch.nn.functional.normalize(method.encoder.encode_text(["a blue sheet", "a green sheet"]), dim=-1)
    torch.testing.assert_close(seen["negatives"][1:, 0], wanted)


def test_without_hard_negatives_nothing_is_counted() -> None:
    outputs = clip(swaps=False).eval().validation_step(batch(["red", "blue"]), 0)
    assert outputs.scalars["hard_accuracy"].isnan() and outputs.counts == {"hard_accuracy": 0}


def test_validation_is_repeatable() -> None:
    method = clip().eval()
    data = batch(["red", "green"])
    first, second = (method.validation_step(data, 3).scalars["loss"] for _ in range(2))
    torch.testing.assert_close(first, second)


def test_the_scale_is_capped() -> None:
    method = clip(swaps=False)
    method.encoder.model.logit_scale.data.fill_(20.0)
    torch.testing.assert_close(method.training_losses(batch(["red", "blue"]))["scale"], torch.tensor(100.0))


def test_a_row_without_text_is_named() -> None:
    with pytest.raises(ValueError, match="row0: found no caption"):
        captions(Batch(["row0"], [[]]))
