"""What a method can do, in words."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from umm_zoo.backbones.feature_encoder import FeatureEncoder, features_of
from umm_zoo.backbones.latent_codec import LatentCodec
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Images, map_by_size
from umm_zoo.conversation import IMAGE_MARKER, Conversation, Turn
from umm_zoo.errors import UserError
from umm_zoo.outputs import Answers, Reconstructs

#: Functions of a capability, and what a method that has them can do.
_WORDS = {
    "answer questions and describe images": lambda method: isinstance(method, Answers),
    "generate images": lambda method: hasattr(type(method), "generate"),  # of its class: an instance without it asks here
    "reconstruct images": lambda method: isinstance(method, Reconstructs),
    "tell features of images": lambda method: _parts(method) != (None, None, None),
}


def lacking(method: Any, action: str, expected: str) -> UserError:
    """The error of a method that cannot do what it is asked for; it says what it can."""
    able = [words for words, can in _WORDS.items() if can(method)]
    hint = f"this one can {', '.join(able)}" if able else ""
    found = f"a {type(method).__name__}, which cannot {action}"
    return UserError("method", found, f"a method that can ({expected})", hint)


def own_sampling(method: Any) -> dict[str, Any]:
    """Settings of generation that a method has of its own: steps, scales of guidance, temperature, as far as there are any."""
    found: dict[str, Any] = {}
    for holder in (getattr(method, "renderer", None), method):
        steps = getattr(getattr(holder, "objective", None), "num_steps", None)
        scales = getattr(holder, "guidance", None)
        scales = scales if scales is None or isinstance(scales, int | float) else vars(scales)
        values = {"steps": steps, "guidance": scales, "temperature": getattr(holder, "temperature", None)}
        found |= {name: value for name, value in values.items() if value is not None}
    return found


def refused(method: Any) -> frozenset[str]:
    """What a method with a capability does not take all the same, see ``FromPython.refuses``; a stranger's takes everything."""
    found: frozenset[str] = getattr(method, "refuses", frozenset())
    return found


def check_earlier(method: Any, turns: Conversation) -> None:
    """Refuse turns before a question that the chat template of a method's model would leave out.

    Raises:
        UserError: names the first; or the template has no form for them.
    """
    vlm = _parts(method)[1]
    if vlm is None or not turns:
        return
    rendered = "".join(piece.text for piece in vlm.template.render([*turns, Turn(role="user", text="?")], for_generation=True))
    for place, turn in enumerate(turns):
        texts = turn["text"].split(IMAGE_MARKER) if turn["role"] == "user" else [turn["text"]]
        if any(text.strip() not in rendered for text in texts):
            found = f"a {turn['role']} turn, which {type(vlm.template).__name__} leaves out"
            raise UserError(f"messages[{place}]", found, "a question alone", "the run was not trained on conversations")


def _parts(method: Any) -> tuple[FeatureEncoder | None, LibraryVLM | None, LatentCodec | None]:
    """The method's own encoder, vision-language model and codec."""
    kinds = (FeatureEncoder, LibraryVLM, LatentCodec)
    found: Any = tuple(next((child for child in method.children() if isinstance(child, kind)), None) for kind in kinds)
    return found


def features_of_parts(method: Any, images: Images) -> list[Tensor]:
    """See ``FromPython.image_features``."""
    encoder, vlm, codec = _parts(method)
    if encoder is not None:
        return list(features_of(encoder, images))
    if vlm is not None:
        return vlm.encode_images(images)
    if codec is not None:
        return map_by_size(codec.encode, images)
    raise lacking(method, "tell features of images", "a FeatureEncoder, a vision-language model or a codec among its parts")
