"""Contract of every block, for anybody's subclass: ``check_block(MyBlock(...), (inputs,), output_shape=...)``."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from umm_zoo.batch import Batch, Images
from umm_zoo.rewards.base import Reward
from umm_zoo.testing.roles import check_role

#: Largest difference, relative to the largest value, between a float32 and a float64 run of the same block.
_FLOAT64_TOLERANCE = 1e-3


def check_block(
    block: nn.Module,
    inputs: Sequence[Any] | None = None,
    output_shape: Sequence[int] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    unused: Sequence[str] = (),
    random: bool = False,
) -> None:
    """Put a block through what training, checkpoints, mixed precision and averaging need of it.

    Args:
        block: built, small; it is copied and not changed.
        inputs: positional arguments of ``forward``: tensors, dataclasses, tuples or maps of them, or plain values. None is the
            block's own ``example_inputs()``, which the base classes of queries, positions, connectors, details and pathways have.
        output_shape: of the first tensor that comes out; None does not check it.
        dtypes: that it must run in. Floating inputs are converted too.
        unused: names of parameters that need no gradient on these inputs (frozen ones never do).
        random: whether it draws random numbers even in evaluation mode; it is then seeded before each call. A block may say so
            itself in an attribute of that name.

    Raises:
        AssertionError: says what was expected and what was found.
    """
    name, random = type(block).__name__, random or bool(getattr(block, "random", False))
    block = copy.deepcopy(block).eval()
    _check_class(type(block))
    if inputs is None:
        assert hasattr(block, "example_inputs"), f"{name}: expected inputs, or a block with a method example_inputs()"
        own: Any = block
        inputs = tuple(own.example_inputs())
    arguments = tuple(inputs)
    before = {key: value.clone() for key, value in block.state_dict().items()}

    output = _first(_run(block, arguments), name)
    if output_shape is not None:
        assert tuple(output.shape) == tuple(output_shape), (
            f"{name}: expected an output of shape {list(output_shape)}, found {list(output.shape)}"
        )
    assert output.isfinite().all(), f"{name}: expected finite outputs, found {int((~output.isfinite()).sum())} that are not"
    again = _first(_run(block, arguments, seed=0 if random else 1), name)
    drawn = "" if random else "; a block that draws random numbers in evaluation mode is checked with random=True"
    assert torch.equal(output, again), f"{name}: expected the same output twice in evaluation mode, found other values{drawn}"

    check_role(copy.deepcopy(block))
    _check_gradients(block, arguments, unused)
    _check_round_trip(block, arguments, output)
    for dtype in dtypes:
        _check_dtype(block, arguments, output, dtype)
    for key, value in block.state_dict().items():
        assert torch.equal(value, before[key]), f"{name}: expected evaluation to change nothing, found another '{key}'"


def check_reward(reward: Reward, candidates: Images, batch: Batch) -> None:
    """Put a reward through what policy gradients need of it.

    Args:
        reward: built, small.
        candidates: B * G of ``[3, H, W]`` in [-1, 1], G of at least 2.
        batch: B rows.

    Raises:
        AssertionError: says what was expected and what was found.
    """
    name, group = type(reward).__name__, len(candidates) // len(batch)
    _check_class(type(reward))
    trained = [key for key, parameter in reward.named_parameters() if parameter.requires_grad]
    assert not trained, f"{name}: expected nothing to train, found '{trained[0] if trained else ''}' (freeze what it looks through)"
    given = [image.clone().requires_grad_() for image in candidates]
    rewards = reward(given, batch)
    assert rewards.shape == (len(candidates),), f"{name}: expected a reward per candidate, found {list(rewards.shape)}"
    assert rewards.dtype == torch.float32, f"{name}: expected float32, found {rewards.dtype}"
    assert not rewards.requires_grad, f"{name}: expected rewards without gradient, found some with"
    assert rewards.isfinite().all(), f"{name}: expected finite rewards, found {int((~rewards.isfinite()).sum())} that are not"
    again = reward(candidates, batch)
    assert torch.equal(again, rewards), f"{name}: expected the same rewards twice, found other values"
    order = torch.arange(len(candidates)).unflatten(0, (-1, group)).flip(1).flatten()  # reversed within each group
    turned = reward([candidates[place] for place in order.tolist()], batch)
    assert torch.allclose(turned, rewards[order], atol=1e-5), (
        f"{name}: expected a candidate's reward not to depend on its place in the group, found another"
    )


def _check_class(kind: type[nn.Module]) -> None:
    name = kind.__name__
    assert (kind.__doc__ or "").strip(), f"{name}: expected a docstring, found none"
    if vars(nn.Module)["__init__"] is kind.__init__:
        return  # no constructor of its own
    for parameter in inspect.signature(kind).parameters.values():
        assert parameter.kind is not parameter.VAR_KEYWORD, (
            f"{name}: expected a constructor that names its arguments, found **{parameter.name}, which swallows misspelt ones"
        )


def _check_gradients(block: nn.Module, arguments: tuple[Any, ...], unused: Sequence[str]) -> None:
    name, trained = type(block).__name__, copy.deepcopy(block)
    wanted = {key: p for key, p in trained.named_parameters() if p.requires_grad and key not in unused}
    if not wanted:
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = [t for t in _tensors(trained(*copy.deepcopy(arguments))) if t.is_floating_point() and t.requires_grad]
        assert outputs, f"{name}: expected an output that depends on the {len(wanted)} trainable parameters, found none"
        # random weights per element: a plain sum has no gradient through a normalised output
        torch.stack([(out.float() * torch.randn_like(out.float())).sum() for out in outputs]).sum().backward()
    for key, parameter in wanted.items():
        assert parameter.grad is not None, (
            f"{name}: expected a gradient for '{key}', found none (name it in unused if that is meant)"
        )
        assert parameter.grad.isfinite().all(), f"{name}: expected a finite gradient for '{key}', found one that is not"
    for key, parameter in trained.named_parameters():
        assert parameter.requires_grad or parameter.grad is None, f"{name}: expected no gradient for the frozen '{key}', found one"


def _check_round_trip(block: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
    name = type(block).__name__
    stored = io.BytesIO()
    torch.save(block.state_dict(), stored)
    stored.seek(0)
    twin = copy.deepcopy(block)
    own = {id(tensor) for tensor in [*block.parameters(), *block.buffers()]}
    shared = [tensor for tensor in [*twin.parameters(), *twin.buffers()] if id(tensor) in own]
    assert not shared, f"{name}: expected a deepcopy to share nothing, found {len(shared)} tensors in both"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    twin.load_state_dict(torch.load(stored, weights_only=True))
    found = _first(_run(twin, arguments), name)
    assert torch.equal(found, output), f"{name}: expected the same output after state_dict() and load_state_dict(), found another"


def _check_dtype(block: nn.Module, arguments: tuple[Any, ...], output: Tensor, dtype: torch.dtype) -> None:
    name, converted = type(block).__name__, copy.deepcopy(block).to(dtype)
    try:
        found = _first(_run(converted, _converted(copy.deepcopy(arguments), dtype)), name)
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0]
        raise AssertionError(f"{name}: expected a forward pass in {dtype}, found {reason}") from error
    if output.is_floating_point():
        assert found.dtype == dtype, f"{name}: expected an output of {dtype} for weights and inputs of {dtype}, found {found.dtype}"
    assert found.isfinite().all(), f"{name}: expected finite outputs in {dtype}, found some that are not"
    if dtype == torch.float64 and output.dtype == torch.float32:
        gap = float((found - output).abs().max() / output.abs().max().clamp(min=1e-6)) if output.numel() else 0.0
        assert gap < _FLOAT64_TOLERANCE, (
            f"{name}: expected float64 to agree with float32 to {_FLOAT64_TOLERANCE:.0e} of the largest value, found {gap:.1e}"
        )


def _run(block: nn.Module, arguments: tuple[Any, ...], seed: int = 0) -> Any:
    """Outputs, with the caller's random numbers left as they were."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return block(*copy.deepcopy(arguments))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, item.name) for item in fields(value)]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for inner in inside for tensor in _tensors(inner)]


def _first(value: Any, name: str) -> Tensor:
    found = _tensors(value)
    assert found, f"{name}: expected a tensor among the outputs, found {type(value).__name__}"
    return found[0].detach()


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: _converted(getattr(value, item.name), dtype) for item in fields(value) if item.init})
    if isinstance(value, Mapping):
        return {key: _converted(inner, dtype) for key, inner in value.items()}
    if isinstance(value, (tuple, list)):
        inside = [_converted(inner, dtype) for inner in value]
        return type(value)(*inside) if hasattr(value, "_fields") else type(value)(inside)
    return value
