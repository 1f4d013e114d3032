import importlib.util
from pathlib import Path

import pytest

from umm_zoo.backbones.tokenizer import SHIPPED, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize(
    "text",
    ["", " two  spaces\n\n", "naïve 漢字 🙂\t\r\n", "\x00\x7f", "<|im_start|>user\n<image>", "It's 3.14 of 10,000!", "don 't ."],
)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=False) == text


def test_special_tokens_are_single_and_distinct(tokenizer):
    names = ["<|pad|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    names += ["<|image_pad|>", "<|video_pad|>", "<image>"]
    ids = [tokenizer(name)["input_ids"] for name in names]
    assert all(len(found) == 1 for found in ids) and len({found[0] for found in ids}) == len(names)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode([i for found in ids for i in found], skip_special_tokens=True) == ""


def test_one_word_answers_are_one_token(tokenizer):
    for word in ("red", "circle", "yes", "no", "small", "two"):
        assert len(tokenizer(word)["input_ids"]) == 1, word
    assert len(tokenizer("top left: a small red circle")["input_ids"]) == 7
    assert len(tokenizer) == 1024


def test_the_shipped_file_is_what_the_tool_makes():
    spec = importlib.util.spec_from_file_location("train_tokenizer", ROOT / "tools" / "train_tokenizer.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.train().to_str(pretty=True) == (SHIPPED / "tokenizer.json").read_text(encoding="utf-8")


def test_a_folder_is_loaded_and_a_missing_one_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "copy")
    again = load_tokenizer(str(tmp_path / "copy"))
    assert again("a red circle<image>")["input_ids"] == tokenizer("a red circle<image>")["input_ids"]
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_tokenizer(str(tmp_path / "no-such-folder"))
