"""A sample's image, shown and generated again, or generated out of nothing."""

from __future__ import annotations

import json

import pytest

from data_pipelines.decoding import BadSampleError
from data_pipelines.generation_tasks import FromCaption, Reconstruction, Unconditional


def test_the_image_to_generate_is_input_and_target():
    members = {"json": json.dumps({"task": "edits", "scene": {"a": 1}, "target_scene": {"b": 2}}).encode(), "0.png": b"in", "target.png": b"out"}  # fmt: skip  # noqa: E501
    sample = Reconstruction()("key", members)
    assert sample.images == [b"out"] and sample.target == b"out"
    assert sample.meta == {"task": "reconstruction", "kind": "reconstruction", "scene": {"b": 2}, "target_scene": {"b": 2}}
    assert sample.conversation == [{"role": "user", "text": "<image>\nReconstruct the image."}]


def test_a_captioned_image_serves_too():
    sample = Unconditional()("key", {"jpg": b"photo", "txt": b"a dog"})
    assert (sample.images, sample.target, sample.meta["task"]) == ([], b"photo", "unconditional")
    assert sample.conversation == [{"role": "user", "text": "Generate an image."}]


def test_nothing_to_generate_is_a_bad_sample():
    with pytest.raises(BadSampleError, match="no image"):
        Reconstruction()("key", {"txt": b"a dog"})


def test_a_caption_is_the_prompt_of_its_image():
    turns = [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": " a dog "}]
    members = {"json": json.dumps({"conversations": turns, "captions": ["a dog", "a hound"], "task": "caption"}).encode()}
    sample = FromCaption()("key", members | {"0.jpg": b"photo"})
    assert (sample.conversation, sample.images, sample.target) == ([{"role": "user", "text": "a dog"}], [], b"photo")
    assert sample.meta == {"captions": ["a dog", "a hound"], "task": "text_to_image", "kind": "text_to_image"}
    assert FromCaption()("key", {"jpg": b"photo", "txt": b"a cat"}).conversation[0]["text"] == "a cat"
    with pytest.raises(BadSampleError, match="no caption"):
        FromCaption()("key", {"json": json.dumps({"conversations": turns[:1]}).encode(), "0.jpg": b"photo"})
