"""Tables of all that is constant when a method makes an image of a text: the decoder's call, times, the sampler, the connector."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umm_zoo.batch import Grid, Tokens
from umm_zoo.objectives.decoding import DecoderObjective
from umm_zoo.objectives.guidance import Branch
from umm_zoo.release.sources import Source

Tables = tuple[dict[str, Any], dict[str, Tensor], Any]


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
