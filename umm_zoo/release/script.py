"""Script beside an exported bridge that makes images of prompts with the libraries alone, and the tables that it reads."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
from umm_zoo.batch import Grid, Task, Tokens
from umm_zoo.blocks.details import Details
from umm_zoo.blocks.pathways import ExpertPathway
from umm_zoo.errors import note
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.requests import request_batch
from umm_zoo.objectives.flow_matching import FlowMatching
from umm_zoo.objectives.solvers import DPMSolver, Solver

SCRIPT, TABLE, TENSORS, CONNECTOR = "generate.py", "bridge.json", "bridge.safetensors", "connector.pt2"

_SCRIPT = '''\
"""python generate.py "a red circle" out.png [SEED]: an image of a prompt, with torch, transformers, diffusers and safetensors."""
import copy, json, sys
from pathlib import Path
import diffusers, torch, transformers
from safetensors.torch import load_file

here, seed = Path(__file__).resolve().parent, int(sys.argv[3]) if len(sys.argv) > 3 else 0
table = json.loads((here / "bridge.json").read_text())
tensors, rest = load_file(here / "bridge.safetensors"), load_file(here / "method.safetensors")
own = lambda prefix: {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}
vlm = transformers.AutoModelForImageTextToText.from_pretrained(here / "vlm").eval().model.language_model
words = transformers.AutoTokenizer.from_pretrained(here / "vlm")
decoder, codec = (diffusers.AutoModel.from_pretrained(str(here / name)).eval() for name in ("decoder", "codec"))
connector, stack = torch.export.load(here / "connector.pt2").module(), copy.deepcopy(vlm)
stack.load_state_dict(own("pathway.expert."), strict=False)  # nothing, where the model itself runs on the queries
draw = torch.Generator().manual_seed(seed)
queries = tensors["queries"] + (torch.randn(tensors["queries"].shape, generator=draw) if table["random"] else 0)
queries = torch.cat([tensors["markers"], queries], dim=1)
noise = torch.randn(table["latent"], generator=draw)

def condition(form):
    turns = [{"role": "user", "content": form.replace("{}", sys.argv[1])}]
    text = words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + table["opening"]
    prompt = vlm(input_ids=words(text, add_special_tokens=False, return_tensors="pt").input_ids, use_cache=True).past_key_values
    length, count = prompt.get_seq_length(), queries.shape[1]
    seen = torch.cat([torch.ones(count, length, dtype=torch.bool), tensors["among"]], dim=1)[None, None]
    states = stack(inputs_embeds=queries, position_ids=length + tensors["positions"], past_key_values=prompt,
                   attention_mask={"full_attention": seen}).last_hidden_state
    return connector(own("connector."), states[:, tensors["markers"].shape[1]:])

with torch.no_grad():
    branches, speeds = [(weight, condition(form)) for form, weight in table["branches"]], []
    for time, row in zip([*table["times"], None], table["steps"]):  # every state is a sum of the noise and the velocities so far
        state = sum(factor * value for factor, value in zip(row, [noise, *speeds]))
        if time is not None:
            call = dict(timestep=torch.tensor([time]), return_dict=False)
            speeds.append(sum(weight * decoder(state, encoder_hidden_states=tokens, **call)[0] for weight, tokens in branches))
    image = codec.decode(state / table["scaling"] + table["shift"], return_dict=False)[0].clamp(-1, 1)[0]
diffusers.image_processor.VaeImageProcessor.numpy_to_pil(((image + 1) / 2).permute(1, 2, 0).numpy())[0].save(sys.argv[2])
'''


class _Connector(nn.Module):
    """A connector whose weights come with every call, so that its program holds none."""

    def __init__(self, connector: nn.Module, grid: Grid) -> None:
        super().__init__()
        self._hidden, self.grid = (connector,), grid  # in a tuple: not registered

    def forward(self, weights: dict[str, Tensor], states: Tensor) -> Tensor:
        """The condition ``[1, N, E]``."""
        made = torch.func.functional_call(self._hidden[0], weights, (Tokens(states), self.grid))
        return made.values


def write_script(method: Any, folder: Path) -> bool:
    """Write the script and its tables where the blocks of a bridge allow it; says so where they do not. Returns whether.

    Whatever is constant is put into tables: queries, positions, who attends to whom, the prompts of the guidance branches, times,
    and each state of the sampler as a sum of the noise and the velocities so far, which all solvers here are. The connector is a
    program of ``torch.export``. Text to image in the method's own size.
    """
    if not isinstance(method, Bridge):
        return False
    try:
        tables = _tables(method)
    except Exception as error:  # torch.export refuses in many ways what it cannot follow
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        note(f"no {SCRIPT} is written: {reason}; Method.load reads the folder")
        return False
    table, tensors, program = tables
    torch.export.save(program, folder / CONNECTOR)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
    (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (folder / SCRIPT).write_text(_SCRIPT, encoding="utf-8")
    return True


@torch.no_grad()
def _tables(method: Bridge) -> tuple[dict[str, Any], dict[str, Tensor], Any]:
    if not isinstance(method.vlm, Qwen25VL):
        raise ValueError(f"it knows no {type(method.vlm).__name__}")
    if any(p.dtype != torch.float32 for p in method.parameters()):
        raise ValueError("it computes in float32 alone")
    objective = method.objective
    if not isinstance(objective, FlowMatching) or type(objective).sample is not FlowMatching.sample:
        raise ValueError(f"it cannot sample as {type(objective).__name__} does")
    size = method.image_size
    grid = method.codec.latent_grid(size, size, method.decoder.patch)
    own = method.queries.grid_for(grid)
    queries, markers = _queries(method, grid)
    prompt = method.encode_prompt(request_batch(["a"]), ["full"])
    tokens = method.queries.behind_marker(queries)
    arranged, positions, among = method.pathway.arrange(prompt.prefix, Details.none(tokens), tokens, own)
    if not torch.equal(arranged, tokens):
        raise ValueError("its pathway changes the queries")
    count = tokens.shape[1]
    tensors = {
        "queries": queries,
        "markers": markers,
        "positions": positions - prompt.prefix.next_position[0],
        "among": torch.ones(count, count, dtype=torch.bool) if among is None else among[0],
    }
    states = torch.randn(1, own.num_cells, method.vlm.width)
    weights = {key: value.detach() for key, value in method.connector.state_dict().items()}
    program = torch.export.export(_Connector(method.connector, own), (weights, states), strict=False)
    condition = method.connector(Tokens(states), own)
    if condition.mask is not None or not torch.allclose(program.module()(weights, states), condition.values, atol=1e-5):
        raise ValueError(f"it cannot follow {type(method.connector).__name__}")
    plan = objective.sampling_times(None, grid.h, grid.w)
    named = dict(zip(plan.times, plan.network_times, strict=False))
    scale = _time_scale(method, condition, grid)
    latent, codec = torch.randn(1, method.decoder.latent_channels, grid.h, grid.w), method.codec
    plain = codec.model.decode(latent / codec.scaling + codec.shift, return_dict=False)[0]
    if not torch.allclose(plain, codec.decode(latent), atol=1e-5):
        raise ValueError(f"it cannot decode as {type(codec).__name__} does")
    table = {
        "random": method.queries.random,
        "latent": [1, method.decoder.latent_channels, grid.h, grid.w],
        "opening": method.queries.opening,
        "branches": _branches(method),
        "times": [scale * named.get(time, time) for time in plan.times[:-1]],
        "steps": solver_table(objective.solver or DPMSolver(), plan.times),
        "scaling": method.codec.scaling.item(),
        "shift": method.codec.shift.item(),
    }
    if not isinstance(method.pathway, ExpertPathway) and any(True for _ in method.pathway.parameters()):
        raise ValueError(f"it knows no {type(method.pathway).__name__}")
    return table, tensors, program


def _queries(method: Bridge, grid: Grid) -> tuple[Tensor, Tensor]:
    """What is constant of the queries, ``[1, N, D]``, and the markers before them; what is drawn is added to the former."""
    context = Tokens(torch.zeros(1, 1, method.vlm.width))
    drawn, constant = [], []
    for seed in (1, 2):
        found = method.queries(context, grid, torch.Generator().manual_seed(seed))
        noise = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)) if method.queries.random else 0 * found
        drawn.append(found)
        constant.append(found - noise)
    if not torch.allclose(constant[0], constant[1], atol=1e-5):
        raise ValueError(f"it cannot draw as {type(method.queries).__name__} does")
    first = constant[0] if method.queries.random else drawn[0]
    whole = method.queries.behind_marker(first)
    return first, whole[:, : whole.shape[1] - first.shape[1]]


def _branches(method: Bridge) -> list[tuple[str, float]]:
    """Prompts of the guidance branches, ``{}`` standing for the user's, and their weights."""
    found = []
    for mode, weight in method.guidance.weights(Task.TEXT_TO_IMAGE).items():
        (turns,) = method.dropout.prompts.apply(request_batch(["{}"]), [mode]).conversations
        if [turn["role"] for turn in turns] != ["user"]:
            raise ValueError("its prompts have more than one turn")
        found.append((turns[0]["text"], weight))
    return found


def _time_scale(method: Bridge, condition: Tokens, grid: Grid) -> float:
    """What the decoder's network calls time 1; its only other inputs are the latent and the condition."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    network: Any = method.decoder.model
    hook = network.register_forward_pre_hook(lambda module, inputs, keywords: seen.append((inputs, keywords)), with_kwargs=True)
    noisy = torch.randn(1, method.decoder.latent_channels, grid.h, grid.w)
    try:
        expected = method.decoder(noisy, torch.tensor([0.5]), condition)
    finally:
        hook.remove()
    scale = float(seen[0][1]["timestep"].flatten()[0]) / 0.5
    time = torch.tensor([0.5 * scale])
    plain = network(noisy, encoder_hidden_states=condition.values, timestep=time, return_dict=False)[0]
    if not torch.allclose(plain, expected, atol=1e-5):
        raise ValueError(f"it cannot call {type(network).__name__}")
    return scale


def solver_table(solver: Solver, times: Sequence[float]) -> list[list[float]]:
    """States at which the velocity is asked for, and the last one, as factors of the noise and of the velocities before."""
    count, numbers, rows = len(times), itertools.count(1), list[list[float]]()

    def velocity(state: Tensor, time: float) -> Tensor:
        number = next(numbers)
        rows.append(state[:number].tolist())
        return torch.eye(count, dtype=torch.float64)[number]

    last = solver(velocity, torch.eye(count, dtype=torch.float64)[0], times)
    return [*rows, last.tolist()]
