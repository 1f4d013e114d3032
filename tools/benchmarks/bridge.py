"""A training step of a bridge, ours against naive code and MetaQuery's, by the length of the request.

All arms train the same bridge of the same sizes and random weights: learned queries in a frozen language model, a connector, a
decoder. ``ours`` reads the request under no_grad and keeps its keys and values alone; ``ours-recompute`` keeps no activations of
the queries' layers. ``naive`` runs the model over request and queries in one pass with gradients: the frozen layers keep what
they computed on the request, and the backward pass goes through all of it; its loss is that of ``ours``. ``official`` is
MetaQuery's code (``--metaquery CLONE``) as its configurations run it, with gradient checkpointing; ``official-plain`` is the same
without. Peak memory (weights, gradients, moments, activations) is that of the accelerator, or of the process where there is none,
less what it held before the model was built.
"""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from tools.benchmarks import base, official
from tools.benchmarks.base import Numbers, Options

UNIT, OWN = "step", ("ours", "ours-recompute")
ARMS = ("ours", "ours-recompute", "naive", "official", "official-plain")
SIZES = {"lengths": [64, 256, 1024], "batch": 8, "width": 256, "layers": 6, "heads": 4, "queries": 64, "depth": 1, "steps": 6}
SMALLEST = {"lengths": [16], "batch": 2, "width": 32, "layers": 1, "queries": 5, "steps": 1}


def cases(options: Options) -> list[tuple[str, str]]:
    """Lengths in tokens, and arms."""
    return [(str(length), arm) for length in options.lengths for arm in ARMS]


def missing(options: Options, arm: str) -> str:
    """Why an arm cannot run."""
    return official.missing(options.metaquery) if arm.startswith("official") else ""


def measure(options: Options, setting: str, arm: str) -> Numbers:
    """A step of one arm at one length, in this process."""
    import umm_zoo.methods.metaquery  # noqa: F401  the libraries are in memory before anything is measured

    if arm.startswith("official"):
        official.use(options.metaquery)
        import models.metaquery  # noqa: F401
    before = base.memory_from_here(options.device)
    method = build(options, recompute=arm == "ours-recompute").to(options.device).train()
    batch = request(options, int(setting)).to(options.device)
    if arm.startswith("official"):
        trained, loss = official.metaquery_loss(options, method, batch, recompute=arm == "official")
        del method
        return base.training_step(trained, loss, options, before)
    return base.training_step(method.parameters(), lambda: loss_of(method, batch, arm), options, before)


def loss_of(method: Any, batch: Any, arm: str) -> Any:
    """One training step's loss; the arms differ in how states come about, and in nothing else."""
    import torch

    from umm_zoo.batch import Grid, Tokens, stacked

    if arm.startswith("ours"):
        return method.training_losses(batch)["loss"]
    method.dropout(batch.tasks)  # leaves nothing out here, but draws its numbers
    latents = stacked(method.codec.target_latents(batch))
    grid = Grid(*latents.shape[-2:])
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


def request(options: Options, length: int) -> Any:
    """Rows of a prompt of about so many tokens, and an image to draw."""
    import torch

    from umm_zoo.batch import Batch, Conversation

    # the tokenizer that ships with the package takes a token per short word
    texts = [" ".join([color] * max(1, length - 8)) for color in islice(cycle(("red", "blue", "green")), options.batch)]
    conversations: list[Conversation] = [[{"role": "user", "text": text}] for text in texts]
    targets = torch.rand(options.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Batch([str(row) for row in range(options.batch)], conversations, targets=list(targets))


def build(options: Options, recompute: bool = False) -> Any:
    """The bridge at the stated size; codec and decoder are small, for what is compared comes before them."""
    import torch

    from umm_zoo.backbones.sana import Sana
    from umm_zoo.blocks.metaquery_connector import MetaQueryConnector
    from umm_zoo.blocks.pathways import FrozenPathway
    from umm_zoo.blocks.queries import LearnedQueries
    from umm_zoo.methods.conditioning import ConditionDropout
    from umm_zoo.methods.metaquery import MetaQuery
    from umm_zoo.objectives.flow_matching import FlowMatching

    torch.manual_seed(0)
    decoder = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2}
    decoder |= {"num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32, "caption_channels": 64}
    method = MetaQuery(
        vlm=base.small_qwen(options.width, options.layers, options.heads, options.heads // 2, vision_width=32, vision_layers=1),
        queries=LearnedQueries(options.width, options.queries),
        pathway=FrozenPathway(gradient_checkpointing=recompute),
        connector=MetaQueryConnector(options.width, 64, depth=options.depth, heads=options.heads),
        decoder=Sana.from_config(decoder),
        codec=base.small_codec(4, [8, 8, 8], groups=4),
        objective=FlowMatching(),
        dropout=ConditionDropout(text_to_image=0.0),
    )
    method.train_only(["queries", "connector", "decoder"])
    return method
