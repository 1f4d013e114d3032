"""Checkpoints of the libraries, loaded with nothing missing, nothing ignored, and nothing other than what was stated."""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from umm_zoo.backbones.quantization import loading, quantization_of, settle
from umm_zoo.backbones.stored_config import assert_model_type, complete_transformers, config_of
from umm_zoo.backbones.weight_files import assert_readable, damage_of, stored_file


def on_meta_device() -> bool:
    """Whether modules built now would hold no memory (inside ``with torch.device("meta")``)."""
    return torch.get_default_device().type == "meta"


def find_source(source: str | Path, kind: Any = None) -> str:
    """A name or folder of weights; a relative folder that is not below the current one is looked for beside this package.

    The experiment files of the repository name the shipped parts by their path in it, and may be a ``base:`` of a file elsewhere.

    Args:
        source: the name or folder.
        kind: class of transformers whose weights they should be: the ``model_type`` in the ``config.json`` of a folder is looked
            at, on the meta device too.

    Raises:
        ValueError: the folder holds another kind of model.
    """
    beside = Path(__file__).resolve().parents[2] / source
    found = str(beside) if not Path(source).exists() and beside.is_dir() else str(source)
    config = Path(found, "config.json")
    if kind is not None and config.is_file() and damage_of(config) is None:
        assert_model_type(found, json.loads(config.read_text(encoding="utf-8")), kind)
    elif kind is not None and not config.is_file():
        assert_own_folder(found, kind.__name__)
    return found


def assert_own_folder(source: str | Path, name: str) -> None:
    """Refuse a folder without a ``config.json`` that holds something else than a model of the library.

    Args:
        source: name or folder.
        name: of the class that is to be loaded.

    Raises:
        ValueError: a whole pipeline of diffusers, or an adapter of peft.
    """
    if (parts := stored_file(source, None, "model_index.json")) is not None:
        own = [place for place, part in parts.items() if isinstance(part, list) and part[0] == "transformers"]
        found = f"a whole pipeline ({parts.get('_class_name')}) of {', '.join(own)} and others"
        raise ValueError(f"{source}: found {found}, expected the folder of one model, a {name}")
    if (adapter := stored_file(source, None, "adapter_config.json")) is not None:
        found = f"an adapter of {adapter.get('base_model_name_or_path')} alone"
        raise ValueError(f"{source}: found {found}, expected the weights of a {name}; merge the two with peft first")


def image_processor_of(source: str) -> dict[str, Any]:
    """What the image processor beside the weights of a name or folder says; nothing where there is none."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(source)[0]
    except OSError:
        return {}


def torch_dtype(name: str) -> torch.dtype:
    """The floating dtype of that name.

    Raises:
        ValueError: ``name`` is none of torch's floating dtypes for weights.
    """
    expected = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name not in expected:
        raise ValueError(f"dtype: found '{name}', expected {sorted(expected)}")
    return expected[name]


def load_checkpoint(
    kind: Any,
    source: str,
    dtype: str,
    optional: Collection[str] = (),
    stated: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """``kind.from_pretrained`` of transformers, refusing weights that do not fill the model exactly.

    Files and configuration are looked at before the weights are read.

    Args:
        kind: class of the library.
        source: name or folder.
        dtype: of the weights; ``auto`` is the checkpoint's own.
        optional: prefixes of tensors in the file that this model leaves out on purpose.
        stated: configuration in the experiment; it fills in what the stored one leaves open.
        quantization: see ``Quantization.read``; weights stored in such a form need none.
        settings: further arguments of ``from_pretrained``.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: tensors are missing, unexpected or of another shape; a file or the configuration is not fit for it.
        UserError: a quantisation that cannot be.
    """
    settings |= {"dtype": dtype if dtype == "auto" else torch_dtype(dtype), "ignore_mismatched_sizes": True}
    settings["trust_remote_code"] = False  # unsaid, it would ask on a terminal
    found = checked_config(kind, source, stated, settings.get("subfolder") or "", settings.get("variant"))
    if found is not None:
        settings["config"] = found
    chosen = quantization_of(source, _stored(source, settings.get("subfolder") or ""), quantization, "transformers")
    settings |= loading(chosen, quantization)
    with one_line(source, f"a name or folder with weights of {kind.__name__}"), _unreported():
        model, info = kind.from_pretrained(source, output_loading_info=True, **settings)
    assert_complete(source, info, optional)
    if chosen is not None:
        settle(model)
    return model


@contextmanager
def _unreported() -> Iterator[None]:
    """Without the library's table of unused tensors: ``assert_complete`` refuses those that are not left out on purpose."""
    logger = logging.getLogger("transformers.modeling_utils")

    def kept(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in (said := record.getMessage()) or "CONVERSION" in said  # a weight that cannot be quantised

    logger.addFilter(kept)
    try:
        yield
    finally:
        logger.removeFilter(kept)


def mark_quantized(model: Any, source: str, quantization: Mapping[str, Any] | None) -> Any:
    """A model of transformers on the meta device whose weights say what they would take, were they loaded; nothing else is read
    than the ``config.json`` of a folder.

    Raises:
        UserError: a quantisation that cannot be.
    """
    stored = _stored(source) if Path(source).is_dir() else None
    if (chosen := quantization_of(source, stored, quantization, "transformers")) is not None:
        chosen.mark(model)
    return model


def _stored(source: str, subfolder: str = "") -> dict[str, Any]:
    return dict(PreTrainedConfig.get_config_dict(source, **({"subfolder": subfolder} if subfolder else {}))[0])


def checked_config(
    kind: Any, source: str, stated: Mapping[str, Any] | None = None, subfolder: str = "", variant: str | None = None
) -> PreTrainedConfig | None:
    """Look at the files and the configuration of weights; returns one with what ``stated`` fills in, None where that is nothing.

    Args:
        kind: class of the model.
        source: name or folder.
        stated: configuration in the experiment.
        subfolder: inside the source.
        variant: of the files.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: a file or the configuration is not fit for it.
    """
    expected = f"a name or folder with weights of {kind.__name__}"
    assert_readable(Path(source, subfolder), variant)
    with one_line(source, expected):
        stored = PreTrainedConfig.get_config_dict(source, **({"subfolder": subfolder} if subfolder else {}))[0]
    if not stored:
        raise FileNotFoundError(f"found '{source}', expected {expected} (there is no config.json)")
    if hasattr(getattr(kind, "config_class", None), "model_type"):
        stored.setdefault("model_type", kind.config_class.model_type)
    assert_model_type(source, stored, kind)
    return config_of(kind, stored) if complete_transformers(source, stored, stated or {}) else None


@contextmanager
def one_line(source: str | Path, expected: str) -> Iterator[None]:
    """Make what a library raises over files into one line; each reader stumbles with a class of its own.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: something that cannot be read.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        kind = FileNotFoundError if isinstance(error, OSError) else ValueError
        raise kind(f"found '{source}', expected {expected} ({reason})") from error


def assert_complete(source: str | Path, info: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """Refuse weights that do not fill the model exactly; the libraries only warn and leave random numbers in place.

    Args:
        source: what was loaded, for the message.
        info: ``output_loading_info`` of transformers or diffusers.
        optional: prefixes of tensors in the file that this model leaves out on purpose.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape.
    """
    unexpected = [
        key
        for key in info.get("unexpected_keys", ())
        # old files hold 0, 1, 2 … as "position_ids", and Swin's table of offsets; newer libraries compute them
        if not str(key).startswith(tuple(optional)) and not str(key).endswith(("position_ids", "relative_position_index"))
    ]
    found = {
        "missing": sorted(map(str, info.get("missing_keys", ()))),
        "unexpected": sorted(map(str, unexpected)),
        "of another shape": sorted(str(key) for key in info.get("mismatched_keys", ())),
    }
    problems = [f"{len(keys)} tensors {name}, such as {keys[0]}" for name, keys in found.items() if keys]
    if problems:
        raise ValueError(f"{source}: found weights with {'; '.join(problems)}, expected those of the model")


def assert_known(where: str, config: Mapping[str, Any], expected: Collection[str]) -> None:
    """Refuse a misspelt configuration key; the libraries accept and ignore it.

    Raises:
        ValueError: a key is not in ``expected`` (keys that begin with an underscore are the libraries' own marks).
    """
    for key in config:
        if key not in expected and not key.startswith("_"):
            close = difflib.get_close_matches(key, expected, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"{where}: found '{key}', expected {sorted(expected)}{hint}")


def assert_stated(
    source: str | Path, stated: Mapping[str, Any] | None, found: Any, ignored: Collection[str] = (), where: str = "config"
) -> None:
    """Refuse a checkpoint that is not what the experiment says it is.

    Args:
        source: what was loaded, for the message.
        stated: values by key, nested; None states nothing.
        found: the checkpoint's configuration.
        ignored: keys that are not compared, beside those that begin with an underscore.
        where: path of ``stated``, for the message.

    Raises:
        ValueError: a stated value is another one.
    """
    for key, value in (stated or {}).items():
        own = found.get(key) if isinstance(found, Mapping) else getattr(found, key, None)
        if key == "rope_theta" and own is None:  # the library's older name of it
            own = (getattr(found, "rope_parameters", None) or {}).get(key)
        if isinstance(value, Mapping) and own is not None:
            assert_stated(source, value, own, ignored, f"{where}.{key}")
        elif key not in ignored and not key.startswith("_") and _plain(own) != _plain(value):
            raise ValueError(f"{where}.{key}: found {value!r}, expected {own!r} as in {source}")


def _plain(value: Any) -> Any:
    """Lists for tuples, all the way down: YAML and JSON know no tuples."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
