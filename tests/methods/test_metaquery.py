"""MetaQuery's queries as in its release: new words of the frozen model behind a line break and a marker."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bridge_parts import metaquery, requests
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.backbones.templates import QwenChat
from umm_zoo.batch import Batch, Grid, Task, stacked
from umm_zoo.blocks.pathways import FrozenPathway
from umm_zoo.blocks.positions import SineCosine2d
from umm_zoo.blocks.queries import LearnedQueries, MarkedQueries, PlacedQueries
from umm_zoo.methods.conditioning import ConditioningMode, Prompts
from umm_zoo.methods.metaquery import MetaQuery

SYSTEM = "Please describe the content."
OPEN, CLOSE = "<|im_start|>", "<|im_end|>\n"


def released(**blocks: Any) -> MetaQuery:
    method = metaquery(queries=MarkedQueries(32, 5), **blocks)
    with torch.no_grad():  # far from each other, so that a wrong order shows
        method.queries.marker.normal_()
        method.queries.table.normal_()
    method.vlm.template = QwenChat(SYSTEM)
    return method.eval()


def one_pass(method: MetaQuery, text: str, images: Tensor | None = None) -> Tensor:
    """States of the queries where the whole sequence is tokenised as one string and run at once, as the release does."""
    vlm = method.vlm
    ids = torch.tensor([vlm.tokenizer(text, add_special_tokens=False).input_ids])
    shown = ids == vlm.image_token_id
    embeddings = vlm.text_model.embed_tokens(ids)
    if images is not None:
        embeddings = embeddings.masked_scatter(shown[..., None], torch.cat(vlm.encode_images(images)))
    new = torch.cat([method.queries.marker[None], method.queries.table])[None]
    every = torch.cat([shown, torch.zeros(1, 6, dtype=torch.bool)], dim=1)
    ones = torch.ones(1, every.shape[1], dtype=torch.bool)
    grids = [] if images is None else vlm.image_grids(images)
    positions = vlm.position_ids(torch.cat([ids, torch.ones(1, 6).long()], dim=1), ones, every, grids)
    return vlm.run(torch.cat([embeddings, new], dim=1), ones, positions)[:, -5:]


def conditioned(method: MetaQuery, batch: Batch, mode: ConditioningMode) -> Tensor:
    prompt = method.encode_prompt(batch, [mode])
    return method.condition(prompt, method.draw_queries(prompt, Grid(4, 4)), Grid(4, 4)).values


SHOWN = "<|vision_start|>" + "<|image_pad|>" * 16 + "<|vision_end|>"


@pytest.mark.parametrize(
    ("count", "mode", "words"),
    [
        (0, "full", "a red circle"),
        (0, "nothing", ""),
        (1, "full", f"{SHOWN}Make the circle green."),  # no line break between image and words
        (1, "image", SHOWN),
        (2, "full", f"{SHOWN}{SHOWN}Put the star of the second in the first."),
        (2, "nothing", SHOWN + SHOWN),  # black ones
    ],
)
def test_states_are_those_of_one_pass_over_the_releases_string(count: int, mode: ConditioningMode, words: str) -> None:
    method, batch = released(), requests(count)
    text = f"{OPEN}system\n{SYSTEM}{CLOSE}{OPEN}user\n{words}{CLOSE}{OPEN}assistant\n\n"
    images = None if not count else stacked(batch.images) if mode != "nothing" else torch.full_like(stacked(batch.images), -1.0)
    method.connector = Same()
    assert_close(conditioned(method, batch, mode), one_pass(method, text, images), rtol=1e-4, atol=1e-5)


class Same(torch.nn.Module):
    def forward(self, states, grid):
        return states


def test_the_marker_learns_and_its_state_is_dropped() -> None:
    method, batch = released(), requests(0, 1)
    prompt = method.encode_prompt(batch, ["full", "full"])
    queries = method.draw_queries(prompt, Grid(4, 4))
    assert queries.shape == (2, 5, 32) and method.condition(prompt, queries, Grid(4, 4)).values.shape == (2, 5, 12)
    method.train().training_losses(batch)["loss"].backward()
    assert method.queries.marker.grad.abs().sum() > 0 and method.queries.table.grad.abs().sum(-1).all()
    assert method.checkpoint_keys() >= {"queries.marker", "queries.table"}


def test_a_grid_of_queries_begins_behind_the_marker() -> None:
    method = released(pathway=FrozenPathway(grid_positions=True))
    prompt = method.encode_prompt(requests(0), ["full"])
    tokens = method.queries.behind_marker(torch.randn(1, 6, 32))
    _, positions, _ = method.pathway.arrange(prompt.prefix, prompt.details, tokens, Grid(2, 3))
    start = int(prompt.prefix.next_position)
    assert (positions[:, 0, 0] == start).all()
    assert torch.equal(positions[:, 0, 1:] - start - 1, torch.tensor([[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]))


def test_placed_queries_keep_the_marker_of_those_inside() -> None:
    block = PlacedQueries(MarkedQueries(8, 6), SineCosine2d(8))
    tokens = torch.randn(2, 6, 8)
    assert block.opening == "\n" and torch.equal(block.behind_marker(tokens)[:, 0], block.queries.marker.expand(2, -1))
    plain = LearnedQueries(8, 6)
    assert plain.opening == "" and plain.behind_marker(tokens) is tokens


def test_new_words_start_at_the_mean_of_the_old_ones_with_a_billionth_of_their_covariance() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(9000, 2) @ torch.tensor([[3.0, 2.0], [0.0, 1.0]]) + torch.tensor([5.0, -1.0])
    block = MarkedQueries(2, 2000)
    block.start_from(embeddings)
    rows = torch.cat([block.marker[None], block.table]).detach().double()
    away = (rows - embeddings.double().mean(0)) * 1e9**0.5
    assert away.mean(0).abs().max() < 0.4
    assert_close(away.T.cov(), embeddings.double().T.cov(), rtol=0.15, atol=0.3)


def test_the_method_lets_its_queries_start_from_the_frozen_models_words() -> None:
    method = metaquery(queries=MarkedQueries(32, 5))
    mean = method.vlm.token_embeddings.mean(0)
    assert_close(method.queries.table, mean.expand(5, -1), rtol=0, atol=1e-4)
    assert_close(method.queries.marker, mean, rtol=0, atol=1e-4)


def test_openunis_words_of_a_request() -> None:
    prompts = Prompts(text_to_image="Generate an image: {}")
    batch = requests(0, 0, 1)
    shown = prompts.apply(batch, ["full", "nothing", "full"])
    assert [turns[0]["text"] for turns in shown.conversations] == [
        "Generate an image: a red circle",
        "Generate an image.",
        "<image>\nMake the circle green.",
    ]
    batch.tasks = [Task.UNCONDITIONAL, *batch.tasks[1:]]  # not a text to generate from
    assert prompts.apply(batch, ["nothing", "full", "full"]).conversations[0][0]["text"] == "Generate an image."
