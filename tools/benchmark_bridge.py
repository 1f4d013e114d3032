"""Gain from encoding a prompt once: step time and peak memory of a bridge's training step, ours against the naive one.

    python tools/benchmark_bridge.py [--lengths 64 256 1024] [--batch 8] [--width 256] [--layers 6] [--queries 64] [--repeats 3]

Both arms train the same bridge from the same random weights: learned queries in a frozen language model, a connector, a frozen
decoder. ``naive`` runs the model over request and queries in one pass with gradients, as public code of this family does: the
frozen layers keep what they computed on the request, and the backward pass goes through all of it. ``ours`` reads the request under
no_grad and keeps its keys and values alone. Both give the same loss.

Every arm and length runs in a process of its own, in turns, so that other load on the machine meets all of them; the numbers are
medians over the turns. Peak memory (weights, gradients, moments, activations) is that of the accelerator, or of the process where
there is none, less what the process held before the model was built.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that one tool may use another, from any folder

from tools import timing
from umm_zoo.release.card import markdown_table

ARMS = ("naive", "ours")


def main(arguments: list[str] | None = None) -> int:
    """The command: all turns and their table."""
    options = parser().parse_args(arguments)
    print(table(timing.in_turns(measure, options, [(length, arm) for length in options.lengths for arm in ARMS]), options))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = timing.parser(
        __doc__,
        steps=(6, "timed steps of a turn, after two that are not timed"),
        batch=(8, "rows of a step"),
        width=(256, "width of the language model"),
        layers=(6, "layers of the language model"),
        queries=(64, "queries of a row"),
    )
    made.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="tokens of the request")
    return made


def measure(options: argparse.Namespace, case: tuple[int, str]) -> timing.Numbers:
    """Seconds per step and peak memory in MiB of one arm at one length, in this process."""
    import umm_zoo.methods.metaquery  # noqa: F401  the libraries are in memory before anything is measured

    before = timing.memory(options.device)
    length, arm = case
    method = build_method(options).to(options.device)
    batch = request(options, length).to(options.device)
    seconds = timing.median_step(method, lambda: loss_of(method, batch, arm), options.steps, options.device)
    return {"seconds": seconds, "memory": timing.memory(options.device) - before}


def loss_of(method: Any, batch: Any, arm: str) -> Any:
    """One training step's loss; the arms differ in how states come about, and in nothing else."""
    import torch

    from umm_zoo.batch import Grid, Tokens, stacked

    latents = stacked(method.codec.target_latents(batch))
    grid = Grid(*latents.shape[-2:])
    if arm == "ours":
        prompt = method.encode_prompt(batch, ["full"] * len(batch))
        condition = method.condition(prompt, method.draw_queries(prompt, grid), grid)
        return method.objective(method.decoder, latents, condition)["loss"]
    inputs = method.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
    queries = method.queries(Tokens(inputs.embeddings), grid)
    count, start = queries.shape[1], inputs.position_ids.amax(dim=(0, 2)) + 1
    places = (start[:, None] + torch.arange(count, device=start.device)).expand(3, -1, -1)
    states = method.vlm.model.model.language_model(
        inputs_embeds=torch.cat([inputs.embeddings, queries], dim=1),
        attention_mask=torch.cat([inputs.attention_mask, inputs.attention_mask.new_ones(len(start), count)], dim=1),
        position_ids=torch.cat([inputs.position_ids, places], dim=-1),
        use_cache=False,
    ).last_hidden_state[:, -count:]
    condition = method.connector(Tokens(states), method.queries.grid_for(grid))
    return method.objective(method.decoder, latents, condition)["loss"]


def request(options: argparse.Namespace, length: int) -> Any:
    """Rows of a prompt of about so many tokens, and an image to draw."""
    import torch

    from umm_zoo.batch import Batch, Conversation

    # the tokenizer that ships with the package takes a token per short word
    conversations: list[Conversation] = [[{"role": "user", "text": " ".join(["red"] * max(1, length - 8))}]] * options.batch
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(options.batch, 3, 32, 32, generator=generator) * 2 - 1
    return Batch([str(row) for row in range(options.batch)], conversations, targets=list(targets))


def build_method(options: argparse.Namespace) -> Any:
    """The bridge at the stated size; codec and decoder are small, for what is compared comes before them."""
    import torch

    from umm_zoo.backbones.sana import Sana
    from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
    from umm_zoo.blocks.pathways import FrozenPathway
    from umm_zoo.blocks.queries import LearnedQueries
    from umm_zoo.methods.metaquery import MetaQuery
    from umm_zoo.objectives.flow_matching import FlowMatching

    torch.manual_seed(0)
    decoder = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
    decoder |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 64}
    method = MetaQuery(
        vlm=timing.small_qwen(options.width, options.layers, heads=4, kv_heads=2, vision_width=32, vision_layers=1),
        queries=LearnedQueries(options.width, options.queries),
        pathway=FrozenPathway(),
        connector=MetaQueryConnector(options.width, 64, depth=1, heads=4),
        decoder=Sana.from_config(decoder),
        codec=timing.small_codec(4, [8, 8, 8], groups=4),
        objective=FlowMatching(),
    )
    method.train_only(["queries", "connector"])
    return method


def table(found: dict[tuple[int, str], timing.Numbers], options: argparse.Namespace) -> str:
    """Medians over the turns, as Markdown."""
    rows = []
    for length in options.lengths:
        (slow, fast), (large, small) = ([found[length, arm][name] for arm in ARMS] for name in ("seconds", "memory"))
        row = [str(length), f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.2f} x"]
        rows.append([*row, f"{large:.0f}", f"{small:.0f}", f"{large / small:.2f} x"])
    head = ["request, tokens", "naive, s", "ours, s", "faster", "naive, MiB", "ours, MiB", "smaller"]
    setting = (
        f"{options.device}, {options.batch} rows, {options.queries} queries, language model {options.width} x {options.layers}, "
        f"medians of {options.repeats} turns"
    )
    return "\n".join([setting, "", *markdown_table(head, rows)])


if __name__ == "__main__":
    sys.exit(main())
