"""Tasks of samples, which turn raw members into a conversation, input images and an image to generate.

Images stay bytes here; they are decoded in the loader's worker, once the text has been found usable. What cannot be used raises
``BadSampleError``, whose message says why.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_pipelines.decoding import BadSampleError, decode_array, decode_json, decode_text, one_sample
from umm_zoo.conversation import IMAGE_MARKER, Conversation, Task, Turn, user_text
from umm_zoo.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

#: Suffixes of files in the formats that are read, which are those of images in a shard, too.
IMAGE_TYPES = (
    *("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff"),
    *("jpe", "jfif", "mpo", "jp2", "j2k", "jpx", "apng", "dib", "ppm", "pgm", "pbm", "pnm"),
)
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_NUMBERED = re.compile(rf"(\d+)\.(?:{'|'.join(IMAGE_TYPES)})")
_TARGETS = tuple(f"target.{kind}" for kind in IMAGE_TYPES)
#: What the user asks where a caption is the answer.
INSTRUCTION = "Describe the image."


@dataclass
class Sample:
    """Sample before its images are decoded.

    Args:
        conversation: turns; the k-th ``<image>`` marker of the user's texts is the k-th image.
        images: encoded input images.
        target: the encoded image to generate, where there is one.
        meta: ground truth and everything else, for metrics.
        extras: precomputed arrays by name.
        task: what the sample asks for; None for what its images say (``umm_zoo.batch.task_of``).
    """

    conversation: Conversation
    images: list[bytes] = field(default_factory=list)
    target: bytes | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    task: Task | None = None


class SampleTask(ABC):
    """Base class of tasks, which make a ``Sample`` of raw members.

    Args:
        max_characters: longer texts make a bad sample (our choice: far above any caption, far below what stalls a tokenizer).
        extras: names of ``.npy`` members to be handed on as ``Batch.extras`` (``latents`` for ``KEY.latents.npy``).
    """

    def __init__(self, max_characters: int = 65_536, extras: Sequence[str] = ()) -> None:
        self.max_characters = max_characters
        self.extras = tuple(extras)

    @abstractmethod
    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Interpret the members of one sample; a ``BadSampleError`` where it cannot be used."""

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """The members that are the input images, in order, and the one to generate, by the names of a sample's members alone.

        Bucketings ask: an answer that does not fit what ``sample`` does costs speed and nothing else.
        """
        numbered = sorted((int(match[1]), name) for name in names if (match := _NUMBERED.fullmatch(name)))
        target = next((name for name in names if name in _TARGETS), None)
        return [name for _, name in numbered] or [name for name in names if name in IMAGE_TYPES][:1], target

    def __call__(self, key: str, members: dict[str, bytes]) -> Sample:
        """``sample``, with the markers counted and the precomputed arrays added; whatever it raises is a ``BadSampleError``."""
        with one_sample():
            sample = self.sample(key, members)
        counts = {role: 0 for role in _ROLES.values()}
        for turn in sample.conversation:
            counts[turn["role"]] += turn["text"].count(IMAGE_MARKER)
        if counts["user"] != len(sample.images):
            raise BadSampleError(f"{counts['user']} {IMAGE_MARKER} markers in the user's turns, {len(sample.images)} images")
        if counts["system"]:
            raise BadSampleError(f"{IMAGE_MARKER} in a system turn; images belong to the user's turns")
        for name in self.extras:
            sample.extras[name] = decode_array(member(members, f"{name}.npy"))
        return sample


class Conversations(SampleTask):
    """Task of this project's own layout: ``KEY.json`` with ``conversations``, images ``KEY.0.png`` … and ``KEY.target.png``.

    A single image may also be called ``KEY.jpg``. Turns may have the keys role/text, role/content or (LLaVA's) from/value.
    """

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """Read the conversation and collect the images in order."""
        meta = decode_json(member(members, "json"), self.max_characters)
        if "conversations" not in meta:
            raise BadSampleError("json has no 'conversations'")
        conversation = read_turns(meta.pop("conversations"))
        target = target_image(members)
        if target is None and any(turn["role"] == "assistant" and not turn["text"].strip() for turn in conversation):
            raise BadSampleError("empty answer: nothing would be learnt from it but to be silent")
        return Sample(conversation, input_images(members), target, meta)


class WithoutImages(Conversations):
    """Task of a conversation of which the images are taken away, with their markers: what a model answers by the text alone."""

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, without images."""
        sample = super().sample(key, members)
        for turn in sample.conversation:
            turn["text"] = turn["text"].replace(f"{IMAGE_MARKER}\n", "").replace(IMAGE_MARKER, "")
        return Sample(sample.conversation, [], None, sample.meta)

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """None."""
        return [], None


class TextToImage(Conversations):
    """Task of a prompt and the image to generate for it.

    Reads this project's layout, and pairs of ``KEY.jpg`` (or png, webp) with ``KEY.txt``, as BLIP3-o and img2dataset write them.
    """

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """The user's turn is the prompt; there are no input images."""
        meta = decode_json(members["json"], self.max_characters) if "json" in members else {}
        if "conversations" in meta:
            sample = super().sample(key, members)
            prompt = user_text(sample.conversation)
            target = sample.target or (sample.images[0] if len(sample.images) == 1 else None)
            prompt = prompt.replace(IMAGE_MARKER, "").strip() if sample.target is None else prompt
            meta = sample.meta
        else:
            prompt, target = decode_text(member(members, "txt"), self.max_characters), only_image(members)
        if not prompt:
            raise BadSampleError("the prompt is empty")
        if target is None:
            raise BadSampleError("no image to generate (KEY.target.png, or one image beside the text)")
        return Sample([Turn(role="user", text=prompt)], [], target, {"task": "text_to_image", **meta})

    def image_names(self, names: Sequence[str]) -> tuple[list[str], str | None]:
        """No input images; the one to generate, or the only image."""
        return [], generated_name(names)


class Editing(Conversations):
    """Task of an instruction, one or more input images, and the edited image."""

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """As ``Conversations``, but target and input image are demanded, and markers put in front where none is written."""
        sample = super().sample(key, members)
        if sample.target is None:
            raise BadSampleError("an edit without KEY.target.png")
        if not sample.images:
            raise BadSampleError("an edit without an input image (KEY.0.png)")
        if not any(IMAGE_MARKER in turn["text"] for turn in sample.conversation):
            first = next((turn for turn in sample.conversation if turn["role"] == "user"), None)
            if first is None:
                raise BadSampleError("an edit without a user turn")
            first["text"] = f"{IMAGE_MARKER}\n" * len(sample.images) + first["text"]
        sample.meta.setdefault("task", "editing")
        return sample


class Captions(SampleTask):
    """Task of images with a caption, ``KEY.jpg`` and ``KEY.txt`` (BLIP3-o, img2dataset), as a question for the caption.

    Of several ``instructions``, as what the user says, the sample's key picks one.
    """

    def __init__(
        self, instructions: Sequence[str] = (INSTRUCTION,), max_characters: int = 65_536, extras: Sequence[str] = ()
    ) -> None:
        super().__init__(max_characters, extras)
        self.instructions = [instructions] if isinstance(instructions, str) else list(instructions)
        if not self.instructions:
            raise UserError("", "no instruction", "at least one in instructions")

    def sample(self, key: str, members: dict[str, bytes]) -> Sample:
        """The caption is the answer."""
        caption = decode_text(member(members, "txt"), self.max_characters)
        if not caption:
            raise BadSampleError("the caption is empty")
        meta = decode_json(members["json"], self.max_characters) if "json" in members else {}
        instruction = self.instructions[zlib.crc32(key.encode(errors="backslashreplace")) % len(self.instructions)]
        conversation = question_and_answer(instruction, caption.replace(IMAGE_MARKER, ""))
        return Sample(conversation, [only_image(members)], None, {"task": "caption", **meta}, task=Task.CAPTION)


def question_and_answer(question: str, answer: str) -> Conversation:
    """A question about the sample's only image, and its answer."""
    return [Turn(role="user", text=f"{IMAGE_MARKER}\n{question}"), Turn(role="assistant", text=answer)]


def member(members: dict[str, bytes], name: str) -> bytes:
    """A member by name."""
    if name not in members:
        raise BadSampleError(f"member '{name}' is missing (found {', '.join(sorted(members)) or 'none'})")
    return members[name]


def input_images(members: dict[str, bytes]) -> list[bytes]:
    """``0.png``, ``1.jpg`` … in order, or the single ``jpg``."""
    numbered = sorted((int(match[1]), content) for name, content in members.items() if (match := _NUMBERED.fullmatch(name)))
    for place, (number, _) in enumerate(numbered):
        if place and number == numbered[place - 1][0]:
            raise BadSampleError(f"two input images are number {number}")
        if number != place:
            raise BadSampleError(f"input images are numbered {[number for number, _ in numbered]}, not from 0 on")
    if numbered:
        return [content for _, content in numbered]
    found = _one_of(members, IMAGE_TYPES)
    return [] if found is None else [found]


def target_image(members: dict[str, bytes]) -> bytes | None:
    """``target.png`` (or jpg …), None where there is none."""
    return _one_of(members, _TARGETS)


def only_image(members: dict[str, bytes]) -> bytes:
    """The one image of a captioned sample."""
    found = _one_of(members, [name for kind in IMAGE_TYPES for name in (kind, f"0.{kind}")])
    if found is None:
        raise BadSampleError(f"no image (found {', '.join(sorted(members)) or 'none'})")
    return found


def generated_name(names: Sequence[str]) -> str | None:
    """The name of the image to generate of a sample with these members, else that of its first image."""
    single = (*_TARGETS, *IMAGE_TYPES, *(f"0.{kind}" for kind in IMAGE_TYPES))
    return min((name for name in names if name in single), key=single.index, default=None)


def _one_of(members: dict[str, bytes], names: Iterable[str]) -> bytes | None:
    """The only one of some members that is there; files of one name and several types are several samples, not one."""
    found = [name for name in names if name in members]
    if len(found) > 1:
        raise BadSampleError(f"several images of one name: {', '.join(found)}")
    return members[found[0]] if found else None


def read_turns(turns: object) -> Conversation:
    """Turns as written by this project (role/text), by chat templates (role/content) or by LLaVA (from/value)."""
    if not isinstance(turns, list):
        raise BadSampleError(f"'conversations' is a {type(turns).__name__}, a list of turns is needed")
    conversation: Conversation = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadSampleError(f"a turn is a {type(turn).__name__}, an object is needed")
        role = turn.get("role", turn.get("from"))
        text = turn.get("text", turn.get("content", turn.get("value")))
        if not isinstance(role, str) or role not in _ROLES:
            raise BadSampleError(f"a turn has the role {role!r:.80}, expected user, assistant, system")
        if isinstance(text, list):
            text = "\n".join(map(_part, text))
        if not isinstance(text, str):
            raise BadSampleError(f"the text of a turn is a {type(text).__name__}, a string is needed")
        conversation.append({"role": _ROLES[role], "text": text})  # type: ignore[typeddict-item]
    return conversation


def _part(part: object) -> str:
    """The text of one part of a turn, as chat templates write them: ``{"type": "text", "text": …}`` or ``{"type": "image"}``."""
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
        case {"type": "image", **rest} if not any(rest.values()):  # which image it is, the row's list says
            return IMAGE_MARKER
    raise BadSampleError(f"part of a turn that cannot be read: {part!r:.80}")
