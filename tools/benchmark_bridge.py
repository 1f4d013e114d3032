"""What encoding a prompt once is worth: step time and peak memory of a bridge's training step, ours against the naive one.

    python tools/benchmark_bridge.py [--lengths 64 256 1024] [--batch 8] [--width 256] [--layers 6] [--queries 64] [--repeats 3]

Both arms train the same bridge from the same random weights: learned queries in a frozen language model, a connector, a frozen
decoder (``--trained-decoder`` trains it). ``naive`` runs the model over request and queries in one pass with gradients, as public
code of this family does: the frozen layers keep what they computed on the request, and the backward pass goes through all of it.
``ours`` reads the request under no_grad and keeps its keys and values alone. Both give the same loss (``--check`` compares them).

Every arm and length runs in a process of its own, in turns, so that other load on the machine meets all of them; the numbers are
medians over the turns. Peak memory (weights, gradients, moments, activations) is that of the accelerator, or of the process where
there is none, less what the process held before the model was built.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

ARMS = ("naive", "ours")


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.check:
        first, second = (losses(options, arm, options.lengths[0]) for arm in ARMS)
        print(f"loss naive {first:.7f}, ours {second:.7f}")
        return 0 if abs(first - second) < 1e-4 else 1
    if options.arm:
        print(json.dumps(measure(options, options.arm, options.lengths[0])))
        return 0
    results: dict[tuple[int, str], list[dict[str, float]]] = {(length, arm): [] for length in options.lengths for arm in ARMS}
    for _ in range(options.repeats):
        for length, arm in results:
            command = [sys.executable, __file__, "--arm", arm, "--lengths", str(length), *flags(options)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            results[length, arm].append(json.loads(done.stdout.splitlines()[-1]))
    print(table(results, options))
    return 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="tokens of the request")
    made.add_argument("--batch", type=int, default=8, help="rows of a step")
    made.add_argument("--width", type=int, default=256, help="width of the language model")
    made.add_argument("--layers", type=int, default=6, help="layers of the language model")
    made.add_argument("--queries", type=int, default=64, help="queries of a row")
    made.add_argument("--steps", type=int, default=6, help="timed steps of a turn, after two that are not timed")
    made.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--trained-decoder", action="store_true", help="train the decoder too")
    made.add_argument("--check", action="store_true", help="compare the losses of both arms and stop")
    made.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return made


def flags(options: argparse.Namespace) -> list[str]:
    names = ("batch", "width", "layers", "queries", "steps", "device")
    stated = [text for name in names for text in (f"--{name}", str(getattr(options, name)))]
    return stated + (["--trained-decoder"] if options.trained_decoder else [])


def measure(options: argparse.Namespace, arm: str, length: int) -> dict[str, float]:
    """Seconds per step and peak memory in MiB of one arm, in this process."""
    import torch

    import umm_zoo.methods.metaquery  # noqa: F401  the libraries are in memory before anything is measured

    device = torch.device(options.device)
    before = memory(device)
    method = build_method(options).to(device)
    batch = request(options, length).to(device)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
    method.train()
    seconds = []
    for step in range(options.steps + 2):
        start = time.perf_counter()
        loss_of(method, batch, arm).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step >= 2:
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "memory": memory(device) - before}


def losses(options: argparse.Namespace, arm: str, length: int) -> float:
    """The loss of one arm, under the same weights and noise."""
    import torch

    method = build_method(options).to(options.device)
    torch.manual_seed(1)
    return float(loss_of(method, request(options, length).to(options.device), arm).detach())


def loss_of(method: Any, batch: Any, arm: str) -> Any:
    """One training step's loss; the arms differ in how states come about, and in nothing else."""
    import torch

    from umm_zoo.batch import Grid, Tokens

    latents = method.target_latents(batch)
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


def memory(device: Any) -> float:
    """Peak so far, in MiB."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def request(options: argparse.Namespace, length: int) -> Any:
    """Rows of a prompt of about so many tokens, and an image to draw."""
    import torch

    from umm_zoo.batch import Batch, Conversation

    # the tokenizer that ships with the package takes a token per short word
    conversations: list[Conversation] = [[{"role": "user", "text": " ".join(["red"] * max(1, length - 8))}]] * options.batch
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(options.batch, 3, 32, 32, generator=generator) * 2 - 1
    return Batch([str(row) for row in range(options.batch)], conversations, targets=targets)


def build_method(options: argparse.Namespace) -> Any:
    """The bridge at the stated size; codec and decoder are small, for what is compared comes before them."""
    import torch

    from umm_zoo.backbones.codecs import KLCodec
    from umm_zoo.backbones.qwen2_5_vl import Qwen25VL
    from umm_zoo.backbones.sana import Sana
    from umm_zoo.blocks.connectors import TransformerConnector
    from umm_zoo.blocks.pathways import FrozenPathway
    from umm_zoo.blocks.queries import LearnedQueries
    from umm_zoo.methods.metaquery import MetaQuery
    from umm_zoo.objectives.flow_matching import FlowMatching

    torch.manual_seed(0)
    width = options.width
    vlm = Qwen25VL.from_config(
        {
            "tie_word_embeddings": True,
            "text_config": {
                "vocab_size": 1024,
                "hidden_size": width,
                "intermediate_size": 3 * width,
                "num_hidden_layers": options.layers,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": _section(width // 8)},
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 2,
                "patch_size": 4,
                "window_size": 32,
                "fullatt_block_indexes": [0],
                "out_hidden_size": width,
            },
        },
        system_prompt=None,
    )
    codec = KLCodec.from_config(
        {
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
    )
    decoder = Sana.from_config(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": 32,
            "caption_channels": 64,
        }
    )
    method = MetaQuery(
        vlm=vlm,
        queries=LearnedQueries(width, options.queries),
        pathway=FrozenPathway(),
        connector=TransformerConnector(width, 64, depth=1, heads=4),
        decoder=decoder,
        codec=codec,
        objective=FlowMatching(),
    )
    method.train_only(["queries", "connector"] + ["decoder"] * options.trained_decoder)
    return method


def _section(half: int) -> list[int]:
    """How M-RoPE shares out the frequencies of a head: a quarter to time, the rest to rows and columns."""
    quarter = half // 4
    rest = half - quarter
    return [quarter, rest - rest // 2, rest // 2]


def table(results: dict[tuple[int, str], list[dict[str, float]]], options: argparse.Namespace) -> str:
    """Medians over the turns, as Markdown."""
    lines = [
        f"{options.device}, {options.batch} rows, {options.queries} queries, language model {options.width} x {options.layers}, "
        f"medians of {options.repeats} turns",
        "",
        "| request, tokens | naive, s | ours, s | faster | naive, MiB | ours, MiB | smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for length in options.lengths:
        seconds, mebibytes = (
            [statistics.median(turn[name] for turn in results[length, arm]) for arm in ARMS] for name in ("seconds", "memory")
        )
        lines.append(
            f"| {length} | {seconds[0]:.3f} | {seconds[1]:.3f} | {seconds[0] / seconds[1]:.2f} x "
            f"| {mebibytes[0]:.0f} | {mebibytes[1]:.0f} | {mebibytes[0] / mebibytes[1]:.2f} x |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
