"""What makes WeMMU WeMMU: ten properties, each against an independent statement of it."""

from __future__ import annotations

import pytest
import torch
from bridge_parts import encoded, metaquery, requests, tiny_vlm, wemmu
from torch import Tensor
from torch.testing import assert_close

from umm_zoo.batch import Grid, Task, Tokens
from umm_zoo.blocks.pathways import ExpertPathway
from umm_zoo.blocks.positions import CroppedTable2d
from umm_zoo.methods.conditioning import Guidance
from umm_zoo.methods.encoded_prompt import EncodedPrompt
from umm_zoo.objectives.guidance import Branch, GuidedDenoiser


def trained_step(method, batch):
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.1)
    method.training_losses(batch)["loss"].backward()
    optimizer.step()


def whole_mask(prompt: EncodedPrompt, mask: Tensor) -> Tensor:
    """Who attends to whom in one sequence [prompt | details | queries], ``[B, S, S]``, the prompt causal."""
    real = prompt.prefix.attention_mask
    size, length = real.shape
    total = length + mask.shape[1]
    whole = torch.zeros(size, total, total, dtype=torch.bool)
    whole[:, :length, :length] = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None]
    whole[:, length:, :length] = real[:, None]
    whole[:, length:, length:] = mask
    return whole | torch.eye(total, dtype=torch.bool)


def one_pass(method, batch, queries: Tensor, grid: Grid) -> tuple[Tensor, Tensor, int]:
    """The library's own model over the whole sequence at once, with the expert's weights where they equal the frozen ones."""
    inputs = method.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
    prompt = encoded(method, batch)
    tokens, positions, mask = method.pathway.arrange(prompt.prefix, prompt.details, queries, grid)
    size, count = tokens.shape[:2]
    whole = whole_mask(prompt, torch.ones(size, count, count, dtype=torch.bool) if mask is None else mask)
    added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float32).min)[:, None]
    states = method.vlm.model.model.language_model(
        inputs_embeds=torch.cat([inputs.embeddings, tokens], dim=1),
        attention_mask=added,
        position_ids=torch.cat([inputs.position_ids, positions], dim=-1),
        use_cache=False,
    ).last_hidden_state
    length = inputs.embeddings.shape[1]
    return states[:, :length], states[:, length:], length


@pytest.mark.parametrize("counts", [(0,), (1,), (2,), (0, 2, 1)])
def test_01_frozen_path_is_the_same_with_and_without_queries_and_details(counts):
    method, batch = wemmu(), requests(*counts)
    before = method.vlm(method.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)).hidden
    answers = method.answer(batch, 5)
    prompt = encoded(method, batch)
    kept = [layer.keys.clone() for layer in prompt.prefix.cache.layers]
    queries = method.draw_queries(prompt, Grid(3, 4))
    method.condition(prompt, queries, Grid(3, 4)).values.sum().backward()
    assert all(torch.equal(layer.keys, own) for layer, own in zip(prompt.prefix.cache.layers, kept, strict=True))
    states, _, _ = one_pass(method, batch, queries, Grid(3, 4))
    real = prompt.prefix.attention_mask
    assert_close(states[real], before[real], rtol=0, atol=1e-5)
    trained_step(method.train(), batch)
    after = method.vlm(method.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)).hidden
    assert torch.equal(after, before) and method.answer(batch, 5) == answers  # bit for bit


def test_01_understanding_is_the_same_bit_for_bit_after_four_stages():
    questions = requests(1, 2, 0, seed=9)
    vlm = tiny_vlm()
    hidden = vlm(vlm.inputs_of(questions)).hidden
    answers = vlm.generate(questions.prompts(), questions.images, questions.image_counts, 6)
    generation = requests(0, 1, 0)
    generation.tasks = [Task.TEXT_TO_IMAGE, Task.RECONSTRUCT, Task.UNCONDITIONAL]
    state: dict[str, Tensor] = {}
    for stage, batch in enumerate((generation, generation, requests(1, 0, 1), requests(2, 1, 0)), 1):
        method = wemmu(["pathway", "connector", "detail"] + ["decoder"] * (stage > 1))  # frozen parts as from their own files
        method.load_weights(state)
        trained_step(method.train(), batch)
        checkpoint = {"state_dict": method.state_dict()}
        method.on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
    assert not [key for key in state if key.startswith(("vlm.", "codec."))] and any(key.startswith("decoder.") for key in state)
    assert torch.equal(method.vlm(method.vlm.inputs_of(questions)).hidden, hidden)
    assert method.answer(questions, 6) == answers


@pytest.mark.parametrize("counts", [(1,), (0, 2, 1)])
def test_01_one_encoded_prompt_is_one_pass_over_the_whole_sequence(counts):
    method, batch = wemmu(), requests(*counts)
    prompt = encoded(method, batch)
    queries = method.draw_queries(prompt, Grid(3, 4))
    states = method.pathway(prompt.prefix, prompt.details, queries, Grid(3, 4))
    _, expected, _ = one_pass(method, batch, queries, Grid(3, 4))
    assert_close(states, expected[:, prompt.details.count :], rtol=0, atol=1e-5)


def test_02_queries_differ_between_steps_and_repeat_under_a_seed():
    method, batch = wemmu(), requests(0, 1)
    prompt = encoded(method, batch)
    torch.manual_seed(5)
    first, second = (method.draw_queries(prompt, Grid(4, 4)) for _ in range(2))
    torch.manual_seed(5)
    assert not torch.equal(first, second) and torch.equal(first, method.draw_queries(prompt, Grid(4, 4)))
    assert not torch.equal(first[0], first[1]) and abs(float(first.std()) - 1) < 0.1
    made = [method.sample(["a red circle"], seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_03_truth_table_of_the_mask():
    method, batch = wemmu(), requests(0, 2)
    prompt = encoded(method, batch)
    tokens, _, mask = method.pathway.arrange(prompt.prefix, prompt.details, torch.zeros(2, 6, 32), Grid(2, 3))
    cells = 16
    first, second, queries = slice(0, cells), slice(cells, 2 * cells), slice(2 * cells, 2 * cells + 6)
    assert tokens.shape[1] == 2 * cells + 6
    row = mask[1]
    assert row[first, first].all() and row[second, second].all()  # full inside an image
    assert row[second, first].all() and not row[first, second].any()  # causal between images
    assert not row[: 2 * cells, queries].any()  # no detail token sees a query
    assert row[queries].all()  # queries see all details and each other
    assert not mask[0, queries, : 2 * cells].any() and mask[0, queries, queries].all()  # padding is not seen
    allowed = prompt.prefix.mask_with(mask)  # [2, 1, K + N, L + K + N]
    assert torch.equal(allowed[:, 0, :, : -mask.shape[-1]], prompt.prefix.attention_mask[:, None].expand(-1, mask.shape[1], -1))


def test_03_what_reaches_what():
    """The same by gradients: text and image reach queries and details, details reach queries, queries reach nothing else."""
    method, batch = wemmu(), requests(1)
    prompt = encoded(method, batch)
    tokens, positions, mask = method.pathway.arrange(prompt.prefix, prompt.details, torch.randn(1, 4, 32), Grid(2, 2))
    tokens = tokens.detach().requires_grad_()
    states = method.pathway.stack(tokens, prompt.prefix, positions, mask)
    (gradient,) = torch.autograd.grad(states[0, 5].sum(), tokens, retain_graph=True)
    assert gradient[0, :16].abs().sum(-1).all() and not gradient[0, 16:].any()
    (gradient,) = torch.autograd.grad(states[0, 17].sum(), tokens)
    assert gradient[0].abs().sum(-1).all()


def test_04_details_stand_where_the_vision_tokens_stand_and_queries_form_the_next_image():
    method, batch = wemmu(), requests(0, 2)
    inputs = method.vlm.embed(batch.prompts(), batch.images, batch.image_counts, for_generation=True)
    prompt = encoded(method, batch)
    _, positions, _ = method.pathway.arrange(prompt.prefix, prompt.details, torch.zeros(2, 6, 32), Grid(2, 3))
    assert torch.equal(positions[:, 1, :32], inputs.position_ids[:, 1, inputs.image_mask[1]])
    for row in range(2):
        start = int(inputs.position_ids[:, row].max()) + 1
        expected = [[start, start + r, start + c] for r in range(2) for c in range(3)]
        assert positions[:, row, 32:].T.tolist() == expected


def test_04_an_image_is_encoded_at_the_size_whose_latent_is_the_towers_grid():
    method, batch = wemmu(), requests(1)
    seen = []
    encode = method.codec.encode
    method.codec.encode = lambda images: seen.append(tuple(images.shape[-2:])) or encode(images)  # type: ignore[method-assign]
    encoded(method, batch)
    grid = method.vlm.image_grid(32, 32)
    assert seen == [(grid.h * 2, grid.w * 2)]  # factor 2


@pytest.mark.parametrize(
    ("grid", "rows", "columns"),
    [
        (Grid(2, 3), [1, 2], [1, 2, 3]),  # floor((5 - 2) / 2) = 1, floor((6 - 3) / 2) = 1
        (Grid(3, 4), [1, 2, 3], [1, 2, 3, 4]),
        (Grid(1, 1), [2], [2]),
        (Grid(5, 6), [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_05_centre_crop(grid, rows, columns):
    block = CroppedTable2d(2, max_height=5, max_width=6)
    with torch.no_grad():
        block.table.copy_(torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="ij"), dim=-1))
    found = block(torch.zeros(1, grid.num_cells, 2), grid)[0].tolist()
    assert found == [[float(r), float(c)] for r in rows for c in columns]


@pytest.mark.parametrize("decoder_trained", [False, True])
def test_06_trained_parts_of_a_stage_and_no_gradient_elsewhere(decoder_trained):
    trained = ["queries", "pathway", "connector", "detail"] + ["decoder"] * decoder_trained
    method = wemmu(trained).train()
    method.training_losses(requests(1, 0, 2))["loss"].backward()
    parts = {name: [p.grad is not None and bool(p.grad.any()) for p in part.parameters()] for name, part in method.parts().items()}
    reached = {name for name, touched in parts.items() if touched and all(touched)}
    assert reached == set(trained) - {"queries"}
    assert not any(any(touched) for name, touched in parts.items() if name not in trained)
    assert not list(method.queries.parameters())


def test_06_ranks_touch_the_same_parameters_whatever_their_batch():
    method = wemmu().train()
    method.training_losses(requests(0, 0))["loss"].backward()
    assert all(p.grad is not None for p in method.detail.parameters())
    assert not any(p.grad.any() for p in method.detail.parameters())


def test_07_the_expert_starts_as_the_frozen_model():
    vlm = tiny_vlm()
    pathway = ExpertPathway(bidirectional=False, grid_positions=False)
    pathway.attach(vlm)
    own = dict(pathway.named_parameters())
    frozen = dict(vlm.model.model.language_model.named_parameters())
    assert own and all(torch.equal(value, frozen[key.removeprefix("expert.")]) for key, value in own.items())
    assert {key for key in frozen if f"expert.{key}" not in own} == {"embed_tokens.weight"}
    assert not {id(value) for value in own.values()} & {id(value) for value in frozen.values()}
    conversation = [[{"role": "user", "text": "a red circle and a small blue square at the top left"}]]
    inputs = vlm.embed(conversation, None, [0])
    first = vlm.embed(conversation, None, [0])
    for name in ("token_ids", "embeddings", "attention_mask", "labels", "image_mask"):
        setattr(first, name, getattr(inputs, name)[:, :6])
    first.position_ids = inputs.position_ids[..., :6]
    prefix = vlm.prefix(first)
    count = inputs.embeddings.shape[1] - 6
    states = pathway(prefix, None, inputs.embeddings[:, 6:], Grid(1, count))
    assert_close(states, vlm(inputs).hidden[:, 6:], rtol=0, atol=1e-5)


def test_09_guidance_is_the_papers():
    predictions = {"nothing": 2.0, "image": 5.0, "full": 11.0}

    def guided(task, guidance: Guidance) -> float:
        weights = guidance.weights(task)
        branches = [Branch(Tokens(torch.full((1, 1, 1), predictions[mode])), weight) for mode, weight in weights.items()]

        def denoiser(noisy: Tensor, time: Tensor, condition: Tokens) -> Tensor:
            return condition.values[:, :, :, None]

        return float(GuidedDenoiser(denoiser, branches)(torch.zeros(1, 1, 1, 1), torch.zeros(1)))

    assert guided(Task.TEXT_TO_IMAGE, Guidance()) == pytest.approx(2 + 4.0 * (11 - 2))
    assert guided(Task.EDIT, Guidance()) == pytest.approx(2 + 2.0 * (5 - 2) + 3.0 * (11 - 5))
    assert guided(Task.COMPOSE, Guidance()) == pytest.approx(2 + 3.0 * (11 - 2))
    assert guided(Task.COMPOSE, metaquery().guidance) == pytest.approx(2 + 1.5 * (5 - 2) + 3.0 * (11 - 5))
    assert guided(Task.RECONSTRUCT, Guidance()) == pytest.approx(2 + 2.0 * (5 - 2))
    for task, expected in ((Task.EDIT, 11.0), (Task.TEXT_TO_IMAGE, 11.0), (Task.RECONSTRUCT, 5.0), (Task.UNCONDITIONAL, 2.0)):
        assert guided(task, Guidance.none()) == expected and len(Guidance.none().weights(task)) == 1


def test_10_permuting_queries_with_their_positions_permutes_the_outputs():
    method, batch = wemmu(), requests(1)
    prompt = encoded(method, batch)
    queries = torch.randn(1, 6, 32)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    tokens, positions, mask = method.pathway.arrange(prompt.prefix, prompt.details, queries, Grid(2, 3))
    states = method.pathway.stack(tokens, prompt.prefix, positions, mask)
    index = torch.cat([torch.arange(16), 16 + order])
    permuted = method.pathway.stack(tokens[:, index], prompt.prefix, positions[:, :, index], mask)
    assert_close(permuted[:, 16:], states[:, 16 + order], rtol=0, atol=1e-5)
    alone = method.pathway.stack(tokens[:, index], prompt.prefix, positions, mask)  # the tokens alone do not
    assert not torch.allclose(alone[:, 16:], states[:, 16 + order], atol=1e-3)
