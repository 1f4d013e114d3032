"""Sampling of image tokens, ours and a loop over the library's layers, against the matrix products alone.

``products`` makes the matrix products of a plain loop and nothing else: those of the prompts, of each token's layers with keys and
values that lie in memory, of the head and of the projector. ``ours`` is ``Janus.sample_image``; ``library`` decodes with the
library's layers and its growing cache, and draws with ``torch.multinomial``. With guidance there are two rows per image; ours
encodes equal prompts once, the others do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tools.benchmarks import base
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "call", ("ours",)
#: ``rows`` images of a call on ``prompts`` prompts, a divisor; ``inner`` is the width inside a layer.
SIZES = {"rows": 96, "prompts": 96, "width": 96, "layers": 3, "heads": 4, "inner": 256, "steps": 20}
SMALLEST = {"rows": 4, "prompts": 2, "width": 16, "layers": 1, "heads": 2, "inner": 24, "steps": 1}
#: Sizes of the toy beside those that are options: side of the image, of a patch, and number of codes.
SIDE, PATCH, CODES = 32, 8, 260


def cases(options: Options) -> list[tuple[str, str]]:
    """Without guidance and with it."""
    return [(f"guidance {scale}", arm) for scale in (1, 3) for arm in ("ours", "products", "library")]


def missing(options: Options, arm: str) -> str:
    """Nothing is needed."""
    return ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A call of one arm, in this process."""
    import torch

    torch.manual_seed(0)
    scale, model = float(setting.split()[1]), build(options).to(options.device).eval()
    texts = [f"{number} large circles at the top left" + ", one square" * (number % 4) for number in range(options.prompts)]
    inputs = model.image_prompt(texts)
    calls: dict[str, Callable[[], Any]] = {
        "products": products(model, inputs, options.rows, scale),
        "ours": lambda: model.sample_image(inputs, range(options.rows), scale),
        "library": lambda: grown(model, inputs, options.rows, scale),
    }
    with torch.no_grad():
        return {"seconds": base.timed(calls[arm], options.steps, options.device), "gflop": base.gflop(calls[arm])}


def build(options: Options) -> Any:
    """A Janus of random weights with a codebook of random patches."""
    import torch

    from umm_zoo.backbones.janus import Janus
    from umm_zoo.backbones.patch_codebook import PatchCodebook

    text = {"model_type": "llama", "hidden_size": options.width, "intermediate_size": options.inner}
    text |= {"num_hidden_layers": options.layers, "num_attention_heads": options.heads}
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    codec = PatchCodebook(torch.rand(CODES, 3, PATCH, PATCH) * 2 - 1)
    return Janus.from_config({"text_config": text, "vision_config": vision}, codec=codec)


def products(model: Any, inputs: Any, rows: int, scale: float) -> Callable[[], None]:
    """The products of a call on random operands, which are made beforehand."""
    import torch

    pair, count, (prompts, length) = 1 + (scale != 1), model.generated_grid.num_cells, inputs.token_ids.shape
    heads, width = model.config.text_config.num_attention_heads, model.text_model.layers[0].self_attn.head_dim

    def random(*shape: int) -> Any:
        return torch.randn(shape, device=model.device)

    layers = []
    for layer in model.text_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        known = [random(pair * rows * heads, length + count, width) for _ in range(2)]
        layers.append(([one.weight.T for one in linear], [random(pair * prompts * heads, length, width) for _ in range(3)], known))
    head = [model.image_head.proj_out.weight.T, model.image_head.vision_head.weight.T]
    aligned = [model.image_projector.fc1.weight.T, model.image_projector.hidden_layers[0].weight.T]
    prompt, states, codes = random(pair * prompts * length, model.width), random(pair * rows, model.width), random(rows, 8)

    def layer_products(given: Any, weights: list[Any], query: Any, keys: Any, values: Any) -> None:
        for weight in weights[:3]:
            torch.mm(given, weight)
        torch.bmm(torch.bmm(query, keys.transpose(1, 2)), values)
        torch.mm(given, weights[3])
        torch.mm(given, weights[4])
        torch.mm(torch.mm(given, weights[5]), weights[6])

    def call() -> None:
        for weights, own, _ in layers:
            layer_products(prompt, weights, *own)
        for step in range(count):
            torch.mm(torch.mm(states, head[0]), head[1])
            if step + 1 == count:
                return
            torch.mm(torch.mm(codes, aligned[0]), aligned[1])
            for weights, _, known in layers:
                query = states.view(pair * rows * heads, 1, width)
                layer_products(states, weights, query, *(part[:, : length + step + 1] for part in known))

    return call


def grown(model: Any, inputs: Any, rows: int, scale: float) -> None:
    """Sampling with the library's layers and its growing cache."""
    import torch

    from umm_zoo.backbones.generation import join_rows
    from umm_zoo.backbones.unified import guided

    both = scale != 1
    prefix = model.prefix(join_rows(inputs, model.unconditional(inputs)) if both else inputs)
    prefix = prefix.repeat(rows // len(inputs.token_ids))
    hidden, mask, place = prefix.last_hidden, prefix.attention_mask, prefix.next_position[:, None]
    for step in range(model.generated_grid.num_cells):
        logits = model.image_head(hidden)
        if both:
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, scale)
        drawn = torch.multinomial(logits.softmax(-1), 1).repeat(1 + both, 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if step + 1 < model.generated_grid.num_cells:
            hidden = model.run(model.embed_image(drawn), mask, place + step, prefix.cache)[:, -1]
