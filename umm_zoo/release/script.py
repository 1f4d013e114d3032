"""Script beside an exported method that makes images of prompts with the libraries alone, and the check of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from umm_zoo.backbones.adapters import adapters_of
from umm_zoo.errors import note
from umm_zoo.methods.bridge import Bridge
from umm_zoo.methods.uae.base import UAEBase
from umm_zoo.methods.uae.renderers import BridgeRenderer, CaptionRenderer
from umm_zoo.release.parts import LibraryPart
from umm_zoo.release.sources import BridgeSource, CaptionSource, Source
from umm_zoo.release.tables import tables_of

SCRIPT, TABLE, TENSORS, CONNECTOR = "generate.py", "bridge.json", "bridge.safetensors", "connector.pt2"

_SCRIPT = '''\
"""python generate.py "a red circle" out.png [SEED]: an image of a prompt, with torch, transformers, diffusers and safetensors."""
import copy, json, sys
from pathlib import Path
import diffusers, torch, transformers
from safetensors.torch import load_file

here = Path(__file__).resolve().parent
table = json.loads((here / "bridge.json").read_text())
tensors, rest = load_file(here / "bridge.safetensors"), load_file(here / "method.safetensors")
folder = lambda part: str(here / table["folders"][part])
own = lambda prefix: {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}
words = transformers.AutoTokenizer.from_pretrained(folder("vlm"))
kind = {part: getattr(torch, name) for part, name in table["dtypes"].items()}
whole = transformers.AutoModelForImageTextToText.from_pretrained(folder("vlm"), dtype=kind["vlm"]).eval()
model = whole.get_submodule(table["language"])
decoder, codec = (diffusers.AutoModel.from_pretrained(folder(x), torch_dtype=kind[x]).eval() for x in ("decoder", "codec"))
connector, stack = torch.export.load(here / "connector.pt2").module(), copy.deepcopy(model).to(kind["stack"])
stack.load_state_dict(own(table["keys"] + "pathway.expert."), strict=False)  # nothing, where the model itself runs on the queries

def start(seed):
    """The queries behind their markers, if there are any, and the noise."""
    draw, queries = torch.Generator().manual_seed(seed), tensors.get("queries")
    if queries is not None:
        queries = queries + (torch.randn(queries.shape, generator=draw) if table["random"] else 0)
        queries = torch.cat([tensors["markers"], queries], dim=1)
    return queries, torch.randn(table["latent"], generator=draw)

def condition(text, queries):
    """What the connector makes of the states of the queries behind a text, or of the text itself."""
    ids = words(text, add_special_tokens=False, return_tensors="pt").input_ids
    prompt, length = model(input_ids=ids, use_cache=True), ids.shape[1]
    if queries is None:
        return connector(own(table["keys"] + "connector."), prompt.last_hidden_state.to(kind["connector"]))
    seen = torch.cat([torch.ones(queries.shape[1], length, dtype=torch.bool), tensors["among"]], dim=1)[None, None]
    call = dict(position_ids=length + tensors["positions"], past_key_values=prompt.past_key_values)
    call["attention_mask"] = {"full_attention": seen} if table["masks"] else seen
    states = stack(inputs_embeds=queries.to(kind["stack"]), **call).last_hidden_state
    return connector(own(table["keys"] + "connector."), states[:, tensors["markers"].shape[1]:].to(kind["connector"]))

def predict(noisy, time, tokens):
    """What the decoder predicts at a time under a condition."""
    size, given = table["pack"], {**tensors, "noisy": noisy.to(decoder.dtype), "tokens": tokens.to(decoder.dtype)}
    given["time"] = torch.tensor([table["time"][0] * time + table["time"][1]])
    given["all"] = torch.ones(tokens.shape[:2], dtype=torch.bool)
    given["packed"] = None if size is None else torch.nn.functional.pixel_unshuffle(given["noisy"], size).flatten(2).transpose(1, 2)
    fill = lambda node: {key: fill(value) for key, value in node.items()} if isinstance(node, dict) else given.get(str(node), node)
    made = decoder(**fill(table["call"]), return_dict=False)[0]
    if size is not None:
        grid = (noisy.shape[2] // size, noisy.shape[3] // size)
        made = torch.nn.functional.pixel_shuffle(made.transpose(1, 2).unflatten(2, grid), size)
    return table["sign"] * made[:, :noisy.shape[1]].to(noisy.dtype)

def decode(latent):
    """The image of a latent, in [-1, 1]."""
    return codec.decode((latent / table["scaling"] + table["shift"]).to(codec.dtype), return_dict=False)[0].float().clamp(-1, 1)

if __name__ == "__main__":
    with torch.no_grad():
        queries, noise = start(int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        branches, made = [(weight, condition(text.replace("{}", sys.argv[1]), queries)) for text, weight in table["branches"]], []
        for time, row in zip([*table["times"], None], table["steps"]):  # states are sums of the noise and the predictions so far
            state = sum(factor * value for factor, value in zip(row, [noise, *made]))
            if time is not None:
                made.append(sum(weight * predict(state, time, tokens) for weight, tokens in branches))
        image = (decode(state)[0].permute(1, 2, 0).numpy() + 1) / 2
    diffusers.image_processor.VaeImageProcessor.numpy_to_pil(image)[0].save(sys.argv[2])
'''


def write_script(method: Any, parts: Sequence[LibraryPart], folder: Path) -> bool:
    """Write the script and its tables where the blocks of a method allow it; says so where they do not. Returns whether.

    The library's classes run, on tables of all that is constant: queries, positions, who attends to whom, the texts of the guidance
    branches, what else the decoder is called with, times, and each state of the sampler as a sum of the noise and the predictions
    so far. The connector is a program of ``torch.export``. Text to image, in the method's own size. The script's own functions are
    run once each and compared with the method's.
    """
    files = [folder / name for name in (SCRIPT, TABLE, TENSORS, CONNECTOR)]
    try:
        if adapters_of(method):
            raise ValueError("it knows no adapters, unless they are merged")
        source = _source(method)
        table, tensors, program = tables_of(source)
        keys = next((name for name, module in method.named_modules() if module is source.holder), "")
        table["keys"] = f"{keys}." if keys else ""
        table["folders"] = {name: _folder(parts, getattr(source, name)) for name in ("vlm", "decoder", "codec")}
        torch.export.save(program, folder / CONNECTOR)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / TENSORS, metadata={"format": "pt"})
        (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        (folder / SCRIPT).write_text(_SCRIPT, encoding="utf-8")
        _check(source, folder, table)
    except Exception as error:  # torch.export refuses in many ways what it cannot follow, and a network what it is not called with
        for file in files:
            file.unlink(missing_ok=True)
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        note(f"no {SCRIPT} is written: {reason}; Method.load reads the folder")
        return False
    return True


def _source(method: Any) -> Source:
    """What makes images of texts in a method."""
    if others := {str(p.dtype) for p in method.parameters()} - {"torch.float32", "torch.bfloat16", "torch.float16"}:
        raise ValueError(f"it knows no weights of {', '.join(sorted(others))}")
    if isinstance(method, Bridge):
        return BridgeSource(method)
    renderer = method.renderer if isinstance(method, UAEBase) else None
    if isinstance(renderer, BridgeRenderer):
        return BridgeSource(renderer.bridge)
    if isinstance(renderer, CaptionRenderer):
        return CaptionSource(renderer, method.vlm)
    raise ValueError(f"it knows no {type(method).__name__}")


def _folder(parts: Sequence[LibraryPart], module: Any) -> str:
    found = next((part.folder for part in parts if part.module is module), None)
    if found is None:
        raise ValueError(f"a {type(module).__name__} has no folder of its own")
    return found


@torch.no_grad()
def _check(source: Source, folder: Path, table: dict[str, Any]) -> None:
    """Refuse a script whose functions make anything else than the method's blocks."""
    file = folder / SCRIPT
    made: dict[str, Any] = {"__name__": "script", "__file__": str(file)}
    exec(compile(_SCRIPT, str(file), "exec"), made)
    queries, noise = made["start"](3)
    most = 1e-4 if set(table["dtypes"].values()) == {"float32"} else 0.05  # kernels of 16 bits round in other orders
    asked, time = table["branches"][-1][0], table["times"][0]
    for prompt in ("a red circle", "b"):  # of unequal lengths
        tokens = source.condition(prompt, 3)
        _same(made["condition"](asked.replace("{}", prompt), queries), tokens, most, "it cannot ask as the method does")
        predicted = source.predict(noise, time, tokens)
        _same(made["predict"](noise, time, tokens), predicted, most, f"it cannot call {type(source.decoder.model).__name__}")
    image = source.codec.decode(noise).float().clamp(-1, 1)
    _same(made["decode"](noise), image, most, f"it cannot decode as {type(source.codec).__name__} does")


def _same(found: Tensor, expected: Tensor, most: float, otherwise: str) -> None:
    """Refuse what differs by more than ``most`` of the largest number."""
    if found.shape != expected.shape or (found.float() - expected.float()).abs().max() > most * expected.float().abs().max():
        raise ValueError(otherwise)
