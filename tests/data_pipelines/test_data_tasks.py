import io
import json

import numpy as np
import pytest
from test_shards import data_of, png, write_tar, write_world

from data_pipelines.decoding import BadSampleError
from data_pipelines.shards.data import ShardData, ShardSource
from data_pipelines.tasks import Captions, Conversations, Editing, TextToImage, WithoutImages
from umm_zoo.batch import stacked


def turns(*texts: str, **more) -> bytes:
    roles = ("user", "assistant")
    return json.dumps({"conversations": [{"role": roles[n % 2], "text": text} for n, text in enumerate(texts)], **more}).encode()


def test_llava_turns_and_several_images_keep_their_order():
    row = {"id": 7, "conversations": [{"from": "human", "value": "<image><image>\nWhich?"}, {"from": "gpt", "value": "b"}]}
    sample = Conversations()("k", {"1.jpg": b"B", "0.png": b"A", "json": json.dumps(row).encode()})
    assert sample.images == [b"A", b"B"] and sample.meta == {"id": 7}
    assert [turn["role"] for turn in sample.conversation] == ["user", "assistant"]


@pytest.mark.parametrize(
    "members",
    [
        {"json": turns("A red dot."), "target.png": b"X"},
        {"json": turns("<image>\nA red dot."), "jpg": b"X"},
        {"txt": b"A red dot.\n", "jpg": b"X"},
        {"txt": b"\xef\xbb\xbfA red dot.", "json": b'{"url": "u"}', "webp": b"X"},
    ],
)
def test_a_prompt_and_its_image_in_every_layout(members):
    sample = TextToImage()("k", members)
    assert sample.conversation == [{"role": "user", "text": "A red dot."}] and (sample.images, sample.target) == ([], b"X")


def test_a_conversation_without_its_images():
    sample = WithoutImages()("k", {"json": turns("<image>\nWhich?", "a", "And <image>?", "b"), "0.png": b"A", "1.png": b"B"})
    assert [turn["text"] for turn in sample.conversation] == ["Which?", "a", "And ?", "b"] and sample.images == []


def test_an_edit_without_markers_gets_them():
    sample = Editing()("k", {"json": turns("Make it green."), "0.png": b"A", "1.png": b"B", "target.png": b"C"})
    assert sample.conversation[0]["text"] == "<image>\n<image>\nMake it green." and sample.target == b"C"


def test_instructions_are_chosen_by_key():
    task = Captions(["One?", "Two?"])
    chosen = {key: task(key, {"txt": b"x", "jpg": b""}).conversation[0]["text"] for key in "abcdefgh"}
    assert set(chosen.values()) == {"<image>\nOne?", "<image>\nTwo?"}
    assert chosen == {key: task(key, {"txt": b"x", "jpg": b""}).conversation[0]["text"] for key in "abcdefgh"}


@pytest.mark.parametrize(
    ("task", "members", "reason"),
    [
        (TextToImage(), {"txt": b" ", "jpg": b""}, "prompt is empty"),
        (TextToImage(), {"json": turns("x")}, "no image to generate"),
        (Editing(), {"json": turns("x"), "0.png": b""}, "without KEY.target.png"),
        (Editing(), {"json": turns("x"), "target.png": b""}, "without an input image"),
        (Captions(), {"jpg": b""}, "'txt' is missing"),
        (Captions(), {"txt": b"x"}, "no image"),
        (Conversations(), {"json": turns("<image>"), "0.png": b"", "0.jpg": b""}, "two input images are number 0"),
        (Captions(extras=["latents"]), {"txt": b"x", "jpg": b""}, "'latents.npy' is missing"),
    ],
)
def test_what_a_task_lacks_is_said(task, members, reason):
    with pytest.raises(BadSampleError, match=reason):
        task("k", members)


def test_targets_and_precomputed_arrays_reach_the_batch(tmp_path):
    file = io.BytesIO()
    np.save(file, np.full((2, 3), 7, dtype=np.float16))
    write_tar(tmp_path / "a.tar", {"k": {"txt": b"x", "png": png(5), "latents.npy": file.getvalue()}})
    data = ShardData(
        train={"a": ShardSource(str(tmp_path), TextToImage(extras=["latents"]))}, batch_size=2, image_size=32, target_size=6
    )
    batch = next(iter(data.train_dataloader()))
    assert stacked(batch.requested).shape == (2, 3, 6, 6) and batch.images == []
    assert batch.extras["latents"].tolist() == [[[7] * 3] * 2] * 2


def test_weights_shares_and_epochs_are_told_before_training(tmp_path):
    small, large = write_world(tmp_path / "s", [4]), write_world(tmp_path / "l", [30, 6], first=100)
    weighted = {"s": ShardSource(str(small), weight=1), "l": ShardSource(str(large), weight=3)}
    columns = [list(column.cells) for column in data_of(small, train=weighted).table(samples=400).columns]
    assert columns == [["s", "l"], ["1", "2"], ["4", "36"], ["25.0%", "75.0%"], ["25.00", "8.33"]]
    even = {name: ShardSource(source.shards) for name, source in weighted.items()}
    assert list(data_of(small, train=even).table(samples=400).columns[4].cells) == ["10.00", "10.00"]
    loader = iter(data_of(small, train=even, batch_size=40).train_dataloader())
    assert len(set(next(loader).keys)) == 40
    half = {"s": weighted["s"], "l": even["l"]}
    with pytest.raises(ValueError, match=r"sources \['l'\] have no weight while others have"):
        data_of(small, train=half).check()
