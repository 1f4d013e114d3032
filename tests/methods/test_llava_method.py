import pytest
import tiny_configs
import torch
from learning import losses_of
from torch.testing import assert_close

from umm_zoo.backbones.llava import LlavaBackbone
from umm_zoo.batch import Batch
from umm_zoo.methods.llava import LLaVA
from umm_zoo.outputs import Wanted
from umm_zoo.training.optimization import AdamW, Constant
from umm_zoo.training.setup import TrainingSetup

VISION = tiny_configs.clip()
TEXT = tiny_configs.llama(model_type="qwen2", num_key_value_heads=1)
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1)}


def batch_of(names):
    rows = [[{"role": "user", "text": "<image>\nWhat colour is it?"}, {"role": "assistant", "text": name}] for name in names]
    images = torch.tensor([COLOURS[name] for name in names]).float()[:, :, None, None].expand(-1, 3, 8, 8)
    return Batch(keys=[str(row) for row in range(len(names))], conversations=rows, images=images, image_counts=[1] * len(names))


def method(trained, seed=0):
    torch.manual_seed(seed)
    vlm = LlavaBackbone.from_config({"vision_config": VISION, "text_config": TEXT, "vision_feature_layer": -1})
    own = LLaVA(vlm)
    TrainingSetup(trained, AdamW(lr=1e-2), Constant()).prepare(own)
    own.wanted = Wanted(max_new_tokens=4)
    return own


def step(own, batch):
    optimizer = own.configure_optimizers()["optimizer"]
    own.training_losses(batch)["loss"].backward()
    optimizer.step()


@pytest.mark.parametrize("trained", [["projector"], ["projector", "language_model"]])
def test_a_stage_changes_its_parts_and_no_other(trained):
    own = method(trained).train()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    step(own, batch_of(["red", "blue"]))
    changed = {name.split(".")[1] for name, value in own.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trained)
    assert {key.split(".")[1] for key in own.checkpoint_keys()} == set(trained)


def test_validation_gives_what_the_metrics_read():
    own, batch = method(["projector"]).eval(), batch_of(["red", "blue", "green"])
    outputs = own.validation_step(batch, 0)
    assert outputs.nll.shape == outputs.num_tokens.shape == (3,) and len(outputs.answers) == 3
    assert_close(outputs.nll.sum() / outputs.num_tokens.sum(), own.training_losses(batch)["loss"])
    assert outputs.num_tokens.tolist() == [2, 2, 2]  # the word and the end of the turn


def test_answers_do_not_look_at_the_truth():
    own = method(["projector"]).eval()
    batch = batch_of(["red", "blue"])
    other = batch_of(["green", "green"])
    other.images = batch.images
    assert own.answer(batch, 4) == own.answer(other, 4)


def test_it_learns_to_name_colours():
    own, batch = method(["vision_tower", "projector", "language_model"]).train(), batch_of(["red", "green", "blue"])
    losses = losses_of(own, batch, 40)
    assert losses[-1] < losses[0] / 50
    assert own.eval().answer(batch, 4) == ["red", "green", "blue"]


def test_tokens_of_a_batch_are_counted_by_kind_and_padding_is_computed_text():
    own, batch = method(["projector"]), batch_of(["red", "blue"])
    batch.conversations[1][1]["text"] = "blue, as far as I can see"
    own.training_losses(batch)
    lengths = [len(own.vlm.inputs_of(batch.select([row])).token_ids[0]) for row in (0, 1)]
    assert lengths[0] < lengths[1]
    assert own.token_counts == {"text": (sum(lengths) - 2 * 4, 2 * lengths[1] - 2 * 4), "image": (2 * 4, 2 * 4)}
