"""Bodies of the OpenAI API as requests to a run, and what is refused in them; no server is needed."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from umm_zoo.errors import UserError
from umm_zoo.serve.chat import Speaker, read_chat
from umm_zoo.serve.limits import Limits
from umm_zoo.serve.making import read_making
from umm_zoo.serve.parameters import json_object

sys.path.insert(0, str(Path(__file__).parent))
from served import data_url, png, question

RED, BLUE = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (5, 7), "blue")


def image_part(image: Image.Image, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(image), **more}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def test_a_body_of_lmms_eval_is_a_question() -> None:
    """As its model ``openai`` sends it, the text first."""
    content = [text_part("Is it red?\nAnswer yes or no."), image_part(RED)]
    body = {"messages": [{"role": "user", "content": content}], "model": "toy", "max_tokens": 16, "temperature": 0}
    chat = read_chat(json_object(json.dumps(body).encode()), Limits())
    [row] = chat.rows
    assert row.question == "<image>\nIs it red?\nAnswer yes or no." and row.images[0].size == (8, 6)
    assert row.settings == {"max_new_tokens": 16, "temperature": 0, "top_p": 1, "seed": 0} and not chat.stream


def test_a_body_of_vlmevalkit_is_a_question() -> None:
    """As its OpenAIWrapper sends it: a system prompt, images among the texts, detail, n and a temperature of 0."""
    content = [text_part("First:"), image_part(RED, detail="low"), text_part("second:"), image_part(BLUE, detail="low")]
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": [*content, text_part("Same?")]}]
    body = {"model": "toy", "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}
    [row] = read_chat(body, Limits()).rows
    assert row.earlier == [{"role": "system", "text": "Answer briefly."}]
    assert row.question == "First:\n<image>\nsecond:\n<image>\nSame?"
    assert [image.size for image in row.images] == [(8, 6), (5, 7)]


@pytest.mark.parametrize(
    "content, expected",
    [
        ("What?", "What?"),
        ([text_part("What?"), image_part(RED)], "<image>\nWhat?"),
        ([image_part(RED), text_part("What?"), image_part(BLUE)], "<image>\n<image>\nWhat?"),
        ([text_part("Left <image> or right <image>?"), image_part(RED), image_part(BLUE)], "Left <image> or right <image>?"),
        ([image_part(RED)], "<image>"),
    ],
)
def test_images_stand_before_one_text_and_between_several(content: Any, expected: str) -> None:
    [row] = read_chat({"messages": [{"role": "user", "content": content}]}, Limits()).rows
    assert row.question == expected


def test_earlier_turns_keep_their_images_in_order() -> None:
    first = {"role": "user", "content": [text_part("What?"), image_part(RED)]}
    messages = [
        first,
        {"role": "assistant", "content": "A <image>."},
        {"role": "user", "content": [image_part(BLUE), text_part("And?")]},
    ]
    [row] = read_chat({"messages": messages}, Limits()).rows
    assert [turn["text"] for turn in row.earlier] == ["<image>\nWhat?", "A <image>."]
    assert row.num_earlier_images == 1 and [image.size for image in row.images] == [(8, 6), (5, 7)]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"messages": None}, "messages: found null"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role: found 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, 'messages[0].role: found ["user"]'),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "an end without a question (role assistant)"),
        ({"messages": [{"role": "user", "content": " "}]}, "an end without a question"),
        ({"messages": [{"role": "user", "content": "a\0b"}]}, "messages[0].content: found the character"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "content[0].type: found 'input_audio'"),
        ({"messages": [{"role": "user", "content": "one <image>"}]}, "found 1 <image> markers in its text, expected 0"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "a system message behind others"),
        ({"messages": [{"role": "system", "content": [image_part(RED)]}]}, "type: found 'image_url', expected text"),
        ({"temperature": "hot"}, "temperature: found 'hot', expected a number"),
        ({"top_p": 1.5}, "top_p: found 1.5"),
        ({"seed": -1}, "seed: found -1"),
        ({"n": 99, "temperature": 1}, "n: found 99"),
        ({"n": 2}, "n: found 2 at temperature 0"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"stop": [""]}, "stop: found"),
        ({"stream": "yes"}, "stream: found 'yes'"),
        ({"stream_options": {"include_usage": True}}, "none where stream is not true"),
        ({"tools": [{"type": "function"}]}, "tools: found"),
        ({"response_format": {"type": "json_object"}}, "response_format: found"),
        ({"frequency_penalty": 0.5}, "frequency_penalty: found 0.5"),
        ({"logprobs": True}, "logprobs: found true"),
        ({"top_k": 5}, "top_k: found 5"),
        ({"temprature": 1}, "did you mean 'temperature'?"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_chat({**question("What?"), **change}, Limits())
    assert said in str(error.value)


def test_what_asks_for_nothing_is_taken_and_what_nobody_knows_is_told() -> None:
    neutral = {
        "tools": [],
        "logprobs": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "top_k": -1,
        "user": "me",
        "stop": None,
    }
    chat = read_chat({**question("What?"), **neutral, "zebra": 1, "response_format": {"type": "text"}}, Limits())
    assert chat.ignored == ["zebra"]


def test_more_tokens_than_the_server_gives_are_as_many_as_it_gives() -> None:
    [row] = read_chat({**question("What?"), "max_tokens": 90, "max_completion_tokens": 50}, Limits(max_tokens=40)).rows
    assert row.settings["max_new_tokens"] == 40


def test_answers_of_one_request_have_seeds_of_their_own() -> None:
    rows = read_chat({**question("What?"), "n": 3, "temperature": 1, "seed": 7, "top_p": 0.5}, Limits()).rows
    assert [row.settings["seed"] for row in rows] == [7, 8, 9] and rows[0].settings["top_p"] == 0.5
    first, second = (read_chat({**question("What?"), "temperature": 1}, Limits()).rows[0].settings["seed"] for _ in range(2))
    assert first != second


def bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def as_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    "url, said",
    [
        ("https://example.org/one.png", "found an address (https:…)"),
        ("file:///etc/passwd", "found an address (file:…)"),
        ("iVBORw0KGgo", "a text that is none"),
        ("data:image/png,abc", "expected a data URL"),
        ("data:image/png;base64,a!b", "no base64"),
        (as_url(b"not an image"), "no readable image"),
        (as_url(bomb(60_000, 60_000)), "no readable image (DecompressionBombError)"),
        (as_url(bomb(9_000, 9_000)), "an image of 9000 x 9000 px, expected at most"),
        (as_url(b"P6 1 1 255\nabc", "image/x-portable-pixmap"), "no readable image (UnidentifiedImageError)"),
        (None, "a NoneType"),
    ],
)
def test_images_that_are_none_or_too_large_or_elsewhere_are_refused(url: Any, said: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(UserError) as error:
        read_chat({"messages": [{"role": "user", "content": content}]}, Limits())
    assert said in str(error.value) and "messages[0].content[0].image_url" in str(error.value)


def test_numbers_of_images_and_letters_are_limited() -> None:
    with pytest.raises(UserError, match="more than 1 images"):
        read_chat(question("What?", RED, BLUE), Limits(max_images=1))
    with pytest.raises(UserError, match="more than 3 characters"):
        read_chat(question("What?"), Limits(max_prompt=3))


def test_data_urls_may_be_percent_encoded_and_have_line_breaks() -> None:
    url = data_url(RED)
    for form in (url.replace("+", "%2B").replace("=", "%3D"), url[:60] + "\r\n" + url[60:], url.replace("data:", "DATA:")):
        part = {"type": "image_url", "image_url": form}
        [row] = read_chat({"messages": [{"role": "user", "content": [part]}]}, Limits()).rows
        assert row.images[0].tobytes() == RED.tobytes()


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_one_line(body: bytes) -> None:
    with pytest.raises(UserError, match="body: found"):
        json_object(body)


@pytest.mark.parametrize("stops", [(), ("END",), ("\n", "stop it"), ("EN Do",)])
def test_what_is_told_piece_by_piece_is_the_whole(stops: tuple[str, ...]) -> None:
    said = "  A red\u00e9 circle, sto\n\nps EN Done.  "
    speaker, told = Speaker(stops), []
    for length in range(len(said)):
        told.append(speaker.more(said[:length] + ("\ufffd" if length == 6 else ""), ended=False))
        if speaker.stopped:
            break
    told.append(speaker.more(said, ended=True))
    expected = min((said.partition(stop)[0] for stop in stops), key=len, default=said).strip()
    assert "".join(told) == speaker.text == expected
    assert speaker.stopped == any(stop in said for stop in stops)


def test_sizes_are_width_by_height_and_limited() -> None:
    body = {"prompt": "a star", "size": "12x8", "seed": 3, "n": 2, "steps": 5, "guidance": 2}
    making = read_making(body, None, Limits())
    assert [row.settings["seed"] for row in making.rows] == [3, 4]
    assert making.rows[0].settings == {"seed": 3, "steps": 5, "guidance": 2.0, "size": (8, 12)}
    assert read_making({"prompt": "a star", "size": "auto"}, None, Limits()).rows[0].settings["size"] is None


@pytest.mark.parametrize(
    "change, said",
    [
        ({"size": "8"}, "size: found"),
        ({"size": "4096x4096"}, "size: found 4096x4096, expected at most"),
        ({"response_format": "url"}, "response_format: found 'url', expected b64_json"),
        ({"output_format": "gif"}, "output_format: found 'gif', expected png or jpeg or webp"),
        ({"steps": 251}, "steps: found 251"),
        ({"num_inference_steps": 5}, "did you mean 'steps'?"),
        ({"negative_prompt": "dog"}, "negative_prompt: found 'dog'"),
        ({"background": "transparent"}, "background: found"),
        ({"stream": True}, "stream: found true"),
        ({"prompt": None}, "prompt: found null"),
        ({"image_guidance": 2}, "image_guidance"),
    ],
)
def test_settings_of_images_that_cannot_be_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        read_making({"prompt": "a star", **change}, None, Limits())
    assert said in str(error.value)


def test_one_image_is_an_edit_and_several_a_composition() -> None:
    edit = read_making({"prompt": "Green.", "n": "1", "seed": "5", "image_guidance": "2"}, [png(RED)], Limits())
    both = read_making({"prompt": "Both."}, [png(RED), png(BLUE)], Limits())
    assert (edit.command.num_images, both.command.num_images) == ((1, 1), (2, 1000))
    assert edit.rows[0].settings["seed"] == 5 and [image.size for image in both.rows[0].images] == [(8, 6), (5, 7)]


def test_a_seed_may_come_as_the_other_kind_of_number() -> None:
    [row] = read_chat({**question("What?"), "temperature": 1, "seed": 4.0}, Limits()).rows
    assert row.settings["seed"] == 4
