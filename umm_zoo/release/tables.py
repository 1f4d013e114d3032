"""Tables of all that is constant when a method makes an image of a text: queries, texts, the decoder's call, times, sampler."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.backbones.codecs import LatentCodec
from umm_zoo.backbones.image_decoder import ImageDecoder
from umm_zoo.backbones.library_vlm import LibraryVLM
from umm_zoo.batch import Conversation, Grid, Task, Tokens
from umm_zoo.blocks.connectors import Connector
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.requests import request_batch
from umm_zoo.methods.uae.readers import TextOnlyReader
from umm_zoo.methods.uae.renderers import CaptionRenderer
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch, guide

Tables = tuple[dict[str, Any], dict[str, Tensor], Any]


class Source(ABC):
    """What makes images of texts: a language model, a connector, a decoder, a codec.

    Attributes:
        holder: the module that holds the connector.
    """

    holder: nn.Module
    vlm: LibraryVLM
    connector: Connector
    decoder: ImageDecoder
    codec: LatentCodec
    objective: DecoderObjective
    image_size: int

    @property
    def grid(self) -> Grid:
        """Cells of the latent."""
        return self.codec.latent_grid(self.image_size, self.image_size, self.decoder.patch)

    @abstractmethod
    def condition(self, prompt: str, seed: int) -> Tensor:
        """The decoder's condition ``[1, N, E]``."""

    @abstractmethod
    def branches(self) -> list[tuple[str, float]]:
        """Texts of the guidance branches, ``{}`` standing for the user's, and their weights."""

    @abstractmethod
    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """Table and tensors of the queries, and their grid; None where the states of the text itself are the condition."""

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the weights, by part; ``stack`` is what runs on the queries."""
        parts = {"vlm": self.vlm.text_model, "connector": self.connector, "decoder": self.decoder.model, "codec": self.codec}
        found = {name: next(part.parameters()).dtype for name, part in parts.items()}
        return {**found, "stack": found["vlm"]}

    def predict(self, noisy: Tensor, time: float, tokens: Tensor) -> Tensor:
        """The decoder's prediction ``[1, C, h, w]``."""
        predicted: Tensor = self.decoder(noisy, torch.tensor([time]), Tokens(tokens))
        return predicted

    def text(self, conversation: Conversation, opening: str = "") -> str:
        """A request as the model reads it."""
        return "".join(piece.text for piece in self.vlm.template.render(conversation, for_generation=True)) + opening


class BridgeSource(Source):
    """A bridge: queries behind the text."""

    def __init__(self, bridge: Bridge) -> None:
        if not isinstance(bridge.vlm, LibraryVLM):
            raise ValueError(f"it knows no {type(bridge.vlm).__name__}")
        self.bridge = self.holder = bridge
        self.vlm, self.connector, self.decoder, self.codec = bridge.vlm, bridge.connector, bridge.decoder, bridge.codec
        self.objective, self.image_size = bridge.objective, bridge.image_size

    def condition(self, prompt: str, seed: int) -> Tensor:
        """See ``Source``."""
        encoded = self.bridge.encode_prompt(request_batch([prompt]), ["full"])
        queries = self.bridge.draw_queries(encoded, self.grid, [torch.Generator().manual_seed(seed)])
        return self.bridge.condition(encoded, queries, self.grid).values

    def branches(self) -> list[tuple[str, float]]:
        """See ``Source``; the full request comes last."""
        found = []
        weights = self.bridge.guidance.weights(Task.TEXT_TO_IMAGE)
        for mode, weight in sorted(weights.items(), key=lambda item: item[0] == "full"):
            (turns,) = self.bridge.dropout.prompts.apply(request_batch(["{}"]), [mode]).conversations
            found.append((self.text(turns, self.bridge.queries.opening), weight))
        return found

    def dtypes(self) -> dict[str, torch.dtype]:
        """See ``Source``."""
        own = next(self.bridge.pathway.parameters(), None)
        return super().dtypes() if own is None else {**super().dtypes(), "stack": own.dtype}

    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """See ``Source``; what is drawn is added to ``queries``."""
        bridge, own = self.bridge, self.bridge.queries.grid_for(self.grid)
        context = Tokens(torch.zeros(1, 1, self.vlm.width))
        constant = []
        for seed in (1, 2):
            found = bridge.queries(context, self.grid, torch.Generator().manual_seed(seed))
            drawn = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)) if bridge.queries.random else 0 * found
            constant.append(found - drawn)
        if not torch.allclose(constant[0], constant[1], atol=1e-5):
            raise ValueError(f"it cannot draw as {type(bridge.queries).__name__} does")
        if not isinstance(bridge.pathway, ExpertPathway) and any(True for _ in bridge.pathway.parameters()):
            raise ValueError(f"it knows no {type(bridge.pathway).__name__}")
        tokens = bridge.queries.behind_marker(constant[0])
        prefix = bridge.encode_prompt(request_batch(["a"]), ["full"]).prefix
        arranged, positions, among = bridge.pathway.arrange(prefix, Details.none(tokens), tokens, own)
        if not torch.equal(arranged, tokens):
            raise ValueError("its pathway changes the queries")
        count, kinds = tokens.shape[1], getattr(self.vlm.text_model.config, "layer_types", None)
        if others := set(kinds or ()) - {"full_attention"}:
            raise ValueError(f"it knows no layers of {', '.join(sorted(others))}")
        if prefix.plain_positions:
            positions = positions[0]
        tensors = {
            "queries": constant[0],
            "markers": tokens[:, : count - constant[0].shape[1]],
            "positions": positions - prefix.next_position[0],
            "among": torch.ones(count, count, dtype=torch.bool) if among is None else among[0],
        }
        return {"random": bridge.queries.random, "masks": kinds is not None}, tensors, own


class CaptionSource(Source):
    """UAE's renderer: the states of the text itself."""

    def __init__(self, renderer: CaptionRenderer, vlm: LibraryVLM) -> None:
        if not isinstance(renderer.reader, TextOnlyReader):
            raise ValueError(f"it cannot read as {type(renderer.reader).__name__} does")
        self.renderer = self.holder = renderer
        self.reader, self.vlm, self.connector, self.decoder = renderer.reader, vlm, renderer.connector, renderer.decoder
        self.codec, self.objective, self.image_size = renderer.codec, renderer.objective, renderer.image_size

    def condition(self, prompt: str, seed: int) -> Tensor:
        """See ``Source``."""
        return self.renderer.condition(self.vlm, [prompt]).values

    def branches(self) -> list[tuple[str, float]]:
        """See ``Source``."""
        asked, negative = (self._asked(text) for text in ("{}", self.renderer.negative_prompt))
        if self.renderer.guidance == 1:
            return [(asked, 1.0)]
        empty = Tokens(torch.zeros(1, 1, 1))
        return [
            (text, one.weight) for text, one in zip((negative, asked), guide(empty, empty, self.renderer.guidance), strict=True)
        ]

    def _asked(self, text: str) -> str:
        return self.text([{"role": self.reader.role, "text": text}])  # type: ignore[typeddict-item]

    def queries(self) -> tuple[dict[str, Any], dict[str, Tensor], Grid | None]:
        """See ``Source``; there are none."""
        return {"random": False, "masks": False}, {}, None


class _Connector(nn.Module):
    """A connector whose weights come with every call, so that its program holds none."""

    def __init__(self, connector: nn.Module, grid: Grid | None) -> None:
        super().__init__()
        self._hidden, self.grid = (connector,), grid  # in a tuple: not registered

    def forward(self, weights: dict[str, Tensor], states: Tensor) -> Tensor:
        """The condition ``[1, N, E]``."""
        grid = self.grid or Grid(1, states.shape[1])
        made = torch.func.functional_call(self._hidden[0], weights, (Tokens(states), grid))
        return made.values


@torch.no_grad()
def tables_of(source: Source) -> Tables:
    """The table, its tensors and the connector's program; a ``ValueError`` where there is no such table."""
    asked, tensors, grid = source.queries()
    weights = {key: value.detach() for key, value in source.connector.state_dict().items()}
    dtypes = source.dtypes()
    states = torch.randn(1, grid.num_cells if grid else 7, source.vlm.width).to(dtypes["connector"])
    lengths = None if grid else {"weights": dict.fromkeys(weights), "states": {1: torch.export.Dim("length", min=2)}}
    program = torch.export.export(_Connector(source.connector, grid), (weights, states), dynamic_shapes=lengths, strict=False)
    expected = source.connector(Tokens(states), grid or Grid(1, states.shape[1]))
    if expected.mask is not None or not torch.allclose(program.module()(weights, states), expected.values, atol=1e-5):
        raise ValueError(f"it cannot follow {type(source.connector).__name__}")
    call, constants = decoder_call(source)
    times, steps = sampler_table(source.objective, source.grid)
    network: Any = source.vlm.model
    language = next(name for name, module in network.named_modules() if module is source.vlm.text_model)
    table = {
        "language": language,
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()},
        **asked,
        "latent": [1, source.decoder.latent_channels, *source.grid],
        "branches": source.branches(),
        **call,
        "times": times,
        "steps": steps,
        "scaling": source.codec.scaling.item(),
        "shift": source.codec.shift.item(),
    }
    return table, {**tensors, **constants}, program


def decoder_call(source: Source) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a decoder calls its network with, by name, and the tensors among it that are constant."""
    decoder, network = source.decoder, source.decoder.model
    seen: list[dict[str, Any]] = []

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(dict(inspect.signature(network.forward).bind(*given, **named).arguments))

    noisy = torch.randn(1, decoder.latent_channels, *source.grid)
    tokens = source.condition("a red circle", 3)
    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        expected = source.predict(noisy, 0.25, tokens)
        source.predict(noisy, 0.75, tokens)
    finally:
        hook.remove()
    early, late = (float(_time_of(own).flatten()[0]) for own in seen)
    slope = (late - early) / 0.5
    packs = {
        size: F.pixel_unshuffle(noisy, size).flatten(2).transpose(1, 2) for size in (1, 2) if not any(n % size for n in source.grid)
    }
    used: dict[str, Tensor] = {}
    sizes: list[int] = []

    def entry(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: entry(f"{name}.{key}", own) for key, own in value.items()}
        if not isinstance(value, Tensor):
            return value
        for size, pack in packs.items():
            if _equal(value, pack):
                sizes.append(size)
                return "packed"
        if name == "timestep":
            return "time"
        named = {"noisy": noisy, "tokens": tokens, "all": torch.ones(tokens.shape[:2], dtype=value.dtype)}
        if found := next((key for key, own in named.items() if _equal(value, own)), None):
            return found
        used[f"decoder.{name}"] = value.contiguous()
        return f"decoder.{name}"

    call = {name: entry(name, value) for name, value in seen[0].items() if name != "return_dict"}
    made = network(**{**seen[0], "return_dict": False})[0]
    if sizes:
        made = F.pixel_shuffle(made.transpose(1, 2).unflatten(2, (source.grid.h // sizes[0], source.grid.w // sizes[0])), sizes[0])
    sign = -1 if torch.allclose(-made[:, : noisy.shape[1]].to(expected.dtype), expected, atol=1e-5) else 1
    time = [slope, early - 0.25 * slope]
    return {"call": call, "time": time, "pack": sizes[0] if sizes else None, "sign": sign}, used


def _time_of(call: dict[str, Any]) -> Tensor:
    if not isinstance(time := call.get("timestep"), Tensor):
        raise ValueError("its decoder takes no 'timestep'")
    return time


def _equal(value: Tensor, other: Tensor) -> bool:
    return value.shape == other.shape and torch.equal(value, other.to(value.dtype))


def sampler_table(objective: DecoderObjective, grid: Grid) -> tuple[list[float], list[list[float]]]:
    """Times of the predictions, and their states and the last one as factors of the noise and of the predictions before.

    Raises:
        ValueError: the states are no such sums.
    """
    shape = (1, objective.num_steps * 4 + 1, *grid)
    one = Tokens(torch.zeros(1, 1, 1))
    basis = torch.eye(shape[1], dtype=torch.float64)
    times: list[float] = []
    rows: list[list[float]] = []

    def unit(noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
        times.append(float(time.flatten()[0]))
        rows.append(noisy[0, : len(times), 0, 0].tolist())
        return basis[len(times)].view(1, -1, 1, 1).expand(shape)

    last = objective.sample(unit, shape, [Branch(one, 1.0)], noise=basis[0].view(1, -1, 1, 1).expand(shape).clone())
    rows.append(last[0, : len(times) + 1, 0, 0].tolist())
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(len(times) + 1)]
    given = iter(values[1:])
    found = objective.sample(lambda noisy, time, condition: next(given), shape, [Branch(one, 1.0)], noise=values[0])
    if not torch.allclose(found, sum((f * v for f, v in zip(rows[-1], values, strict=True)), torch.zeros(())), atol=1e-4):
        raise ValueError(f"it cannot sample as {type(objective).__name__} does")
    return times, rows
