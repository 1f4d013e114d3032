"""Parameters of a request's body: read and checked, and those that cannot be met refused. Nothing here imports torch.

What would change an answer and cannot be done is refused, unless it has the value that changes nothing; what changes none is passed
over. What nobody here knows is passed over too, as vLLM does it, and named in the header ``X-Ignored-Parameters``, unless it looks
like a misspelt one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from umm_zoo.errors import UserError, nearest
from umm_zoo.generation.options import MAX_SEED, Option, shown, whole
from umm_zoo.generation.requests import Request

#: Parameters that cannot be met, and the values beside null that ask for nothing.
NEUTRAL: Mapping[str, Sequence[Any]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "bad_words": ([],),
    "background": ("auto", "opaque"),
    "best_of": (1,),
    "chat_template": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "mask": (),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "negative_prompt": ("",),
    "partial_images": (0,),
    "presence_penalty": (0,),
    "prompt_logprobs": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (-1,),
    "use_beam_search": (False,),
    "web_search_options": (),
}
#: Parameters that change no answer.
WITHOUT_EFFECT = frozenset(
    {
        "cache_salt",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "priority",
        "prompt_cache_key",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
#: What other servers call parameters that are known here.
_OTHER_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
}


def json_object(body: bytes) -> dict[str, Any]:
    """A body as a map; a ``UserError`` where it is none."""
    try:
        found = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers of thousands of digits, brackets a thousand deep
        reason = str(error)[:100] if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise UserError("body", f"no JSON ({reason})", "a JSON object") from None
    if not isinstance(found, dict):
        raise UserError("body", shown(found), "a JSON object")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def check_names(body: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Names of parameters that are passed over though nobody here knows them.

    Raises:
        UserError: a parameter that cannot be met, or a misspelt one.
    """
    ignored = []
    for name, value in body.items():
        if name in known or name in WITHOUT_EFFECT:
            continue
        if name in NEUTRAL:
            if value is not None and not any(type(value) is type(one) and value == one for one in _alike(NEUTRAL[name])):
                allowed = [json.dumps(one) for one in NEUTRAL[name]]
                raise UserError(name, shown(value), " or ".join(["nothing", *allowed]), "this server cannot do it")
        elif value is not None and (meant := _OTHER_NAMES.get(name) or nearest(name, known)) in known:
            raise UserError(name, "an unknown parameter", ", ".join(sorted(known)), f"did you mean '{meant}'?")
        else:
            ignored.append(name)
    return ignored


def _alike(values: Sequence[Any]) -> list[Any]:
    """The values, whole numbers also as others."""
    whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool)]
    return [*values, *map(float, whole), *([False] if 0 in whole else [])]


def option_in(body: Mapping[str, Any], name: str, option: Option) -> Any:
    """A setting; the option's own default where it is null or not there."""
    value = body.get(name)
    if isinstance(value, float) and value.is_integer():  # JSON knows one kind of numbers
        value = int(value)
    return option.default if value is None else option.read(value, name)


def seed_in(body: Mapping[str, Any]) -> int:
    """The seed; one by chance where none is said, low enough that others can follow it."""
    return int(option_in(body, "seed", whole("", 0, MAX_SEED, random.getrandbits(31))))


def rows_of(request: Request, place: str) -> list[Request]:
    """The requests that one with a ``num`` stands for; errors about them are at ``place``."""
    return [replace(row, place=place) for row in replace(request, place="seed").seed_after_seed()]


def flag_in(body: Mapping[str, Any], name: str) -> bool:
    """A switch, off where nothing is said."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise UserError(name, shown(value), "true or false")
    return bool(value)


def word_in(body: Mapping[str, Any], name: str, words: Sequence[str]) -> str:
    """One of several words, the first where nothing is said."""
    value = body.get(name)
    if value is None:
        return words[0]
    if value not in words:
        raise UserError(name, shown(value), " or ".join(words))
    return str(value)
