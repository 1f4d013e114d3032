"""Tokenizers: the shipped one, and those of public models."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

#: The tokenizer that is shipped with the package (see the card beside it).
SHIPPED = Path(__file__).resolve().parent.parent / "assets" / "tokenizer"


def load_tokenizer(source: str | None = None) -> PreTrainedTokenizerBase:
    """The shipped byte-level tokenizer, or that of a public model.

    Args:
        source: None for the shipped one (1,024 tokens, with the special tokens of Qwen2.5-VL and ``<image>``; end of text is
            ``<|im_end|>``, as in Qwen's chat models; padding has its own token), else a model name or folder.

    Raises:
        FileNotFoundError: no tokenizer there.
    """
    if source is None:
        return PreTrainedTokenizerFast(
            tokenizer_file=str(SHIPPED / "tokenizer.json"),
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
            extra_special_tokens=[
                "<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<image>",
            ],
            clean_up_tokenization_spaces=False,
        )  # fmt: skip
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"tokenizer: found '{source}', expected a model name or folder with one ({reason})") from error
    if tokenizer.pad_token is None:  # Llama and Vicuna have none; padding is masked everywhere, so any token will do
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def tokenizer_source(source: str | Path, stated: str | None = None) -> str | None:
    """Path of a checkpoint's tokenizer: as stated, else in the checkpoint itself, else (None) the shipped one."""
    own = not Path(source).is_dir() or any(Path(source).glob("tokenizer*"))
    return stated or (str(source) if own else None)
