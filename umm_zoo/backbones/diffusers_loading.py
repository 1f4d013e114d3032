"""Networks of the diffusers library, from their config keys or from a folder, with nothing missing and nothing ignored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from umm_zoo.backbones.families import use
from umm_zoo.backbones.loading import (
    assert_complete,
    assert_known,
    assert_stated,
    find_source,
    on_meta_device,
    one_line,
    torch_dtype,
)
from umm_zoo.backbones.quantization import assert_writable, loading, quantization_of, settle
from umm_zoo.backbones.recomputing import recomputed
from umm_zoo.backbones.stored_config import complete_diffusers
from umm_zoo.backbones.weight_files import assert_readable, stored_file


class DiffusersNetwork(nn.Module):
    """Mixin of modules around one network of the library; the network is the only argument that they must be given.

    Attributes:
        kind: the network's class.
        legacy_names: of the class, in older files.
        model: the network.
    """

    kind: ClassVar[type[Any]]
    legacy_names: ClassVar[tuple[str, ...]] = ()
    model: Any

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype: str = "float32", gradient_checkpointing: bool = False) -> Self:
        """Random weights from the library's config keys; what is left out has the library's default.

        Args:
            config: the keys.
            dtype: of the weights.
            gradient_checkpointing: compute activations again in the backward pass instead of storing them.

        Raises:
            ValueError: a key is misspelt, or the library cannot build such a network.
        """
        assert_known(f"{cls.kind.__name__}.config", config, list(inspect.signature(cls.kind.__init__).parameters)[1:])
        try:
            model = cls.kind(**{key: value for key, value in config.items() if not key.startswith("_")})
        except (AttributeError, LookupError, ArithmeticError, AssertionError, NotImplementedError) as error:
            raise ValueError(f"{cls.kind.__name__}.config: the library refuses it ({type(error).__name__}: {error})") from error
        if gradient_checkpointing:
            model.enable_gradient_checkpointing(recomputed)
        return cls(model if dtype == "float32" else model.to(torch_dtype(dtype)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        config: dict[str, Any] | None = None,
        subfolder: str | None = None,
        dtype: str = "float32",
        gradient_checkpointing: bool = False,
        variant: str | None = None,
        quantization: dict[str, Any] | None = None,
    ) -> Self:
        """A folder in the library's format or a name on the hub. On the meta device with ``config`` given nothing is read.

        Args:
            source: folder or name.
            config: what the checkpoint is expected to be; it fills in what the stored configuration leaves open.
            subfolder: of the network inside a whole pipeline, such as ``transformer`` or ``vae``.
            dtype, gradient_checkpointing: see ``from_config``.
            variant: of the files, such as ``fp16`` for ``diffusion_pytorch_model.fp16.safetensors``.
            quantization: 8 or 4 bits a weight, in the library's own words, see ``Quantization.read``; for a part that is frozen.

        Raises:
            FileNotFoundError: nothing there.
            ValueError: the weights do not fill the network exactly, or ``config`` differs from the one stored with them.
        """
        filled = cls.look(find_source(source), subfolder, config)
        if config is not None and on_meta_device():
            network = cls.from_config(config, dtype, gradient_checkpointing)
            stored = stored_file(find_source(source), subfolder)
            if (chosen := quantization_of(str(source), stored, quantization, "diffusers")) is not None:
                chosen.mark(network.model)
            return network
        source, weights = find_source(source), torch_dtype(dtype)
        assert_readable(Path(source, subfolder or ""), variant)
        stored = stored_file(source, subfolder)
        if stored is None:
            with one_line(source, f"a name or folder with weights of {cls.kind.__name__}"):
                stored = dict(cls.kind.load_config(source, subfolder=subfolder))
        if filled is None:
            filled = complete_diffusers(cls.kind, source, stored, config or {}, cls.legacy_names)
        chosen = quantization_of(source, stored, quantization, "diffusers")
        with one_line(source, f"a name or folder with weights of {cls.kind.__name__}"):
            settings = {"subfolder": subfolder, "torch_dtype": weights, "variant": variant} | loading(chosen, quantization)
            model, info = cls.kind.from_pretrained(source, output_loading_info=True, **settings, **filled)
        assert_complete(source, info)
        assert_stated(source, config, model.config)
        if chosen is not None:
            settle(model)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing(recomputed)
        return cls.loaded(model, source, subfolder)

    @classmethod
    def look(cls, source: str, subfolder: str | None, config: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Refuse a local folder with another kind of network, by its ``config.json`` alone; ``fit --check`` comes here too.

        Returns:
            What ``config`` gives that the folder's leaves open, see ``complete_diffusers``; None where there is no such folder.

        Raises:
            ValueError: another network, one that needs more or is not what ``config`` says, or a whole pipeline where one of its
                folders is meant.
        """
        stored, stated = stored_file(source, subfolder), config or {}
        if stored is not None:
            filled = complete_diffusers(cls.kind, source, stored, stated, cls.legacy_names)
            defaults = {key: value.default for key, value in inspect.signature(cls.kind.__init__).parameters.items()}
            try:
                cls.assert_fit({**defaults, **filled, **stored})
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
            assert_stated(source, {key: value for key, value in stated.items() if key in stored}, stored)
            return filled
        elif (parts := stored_file(source, subfolder, "model_index.json")) is not None:
            networks = {place: part[1] for place, part in parts.items() if isinstance(part, list) and part[0] == "diffusers"}
            own = [place for place, name in networks.items() if name == cls.kind.__name__]
            others = [f"{name} in '{place}'{use(name)}" for place, name in networks.items() if use(name)]
            hint = f"; subfolder: {own[0]}" if own else f"; it has {' and '.join(others)}" if others else ""
            found = f"a whole pipeline ({parts.get('_class_name')})"
            raise ValueError(f"{source}: found {found}, expected the folder of a {cls.kind.__name__}{hint}")
        return None

    @classmethod
    def assert_fit(cls, config: Mapping[str, Any]) -> None:
        """Refuse a network of ``kind`` that cannot be used, by its configuration; constructors and ``look`` come here.

        Raises:
            ValueError: it needs more than it would get, or gives something else.
        """

    @classmethod
    def loaded(cls, model: Any, source: str, subfolder: str | None) -> Self:
        """The module around a network that came from there, with what else it reads there."""
        return cls(model)

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``diffusion_pytorch_model.safetensors``, as the library and ``from_pretrained`` read them."""
        assert_writable(self.model, f"{type(self).__name__}.save")
        self.model.save_pretrained(folder)
