"""The benchmark of rollouts runs all of its arms on the same prompts, images and trained parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools import benchmark_rollout as tool
from tools.rollout_arms import trl_trainer
from umm_zoo.batch import stacked

SMALL = ["--batch", "2", "--group", "2", "--tokens", "4", "--width", "32", "--size", "32", "--steps", "1"]


@pytest.mark.parametrize("arm", tool.ARMS)
def test_an_arm_runs_and_its_phases_are_the_step(arm: str):
    if arm == "trl":
        pytest.importorskip("trl")
    found = tool.measure(tool.parser().parse_args(SMALL), arm)
    assert set(found) == set(tool.NUMBERS)
    assert all(found[phase] > 0 for phase in tool.PHASES) and found["samples_per_second"] > 0
    assert found["peak_mb"] >= found["start_mb"] > 0


def test_trl_asks_scores_and_trains_what_ours_does(tmp_path: Path):
    pytest.importorskip("trl")
    options = tool.parser().parse_args(SMALL)
    batch, method, ours = tool.random_images(options), tool.build(options, "trl"), tool.build(options, "ours")
    trainer = trl_trainer(options, method, batch, str(tmp_path))
    trained = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (trainer.model, ours)]
    assert trained[0] == trained[1] > 0

    own = method.vlm.embed(method.captions.conversations(2), batch.images, [1, 1], for_generation=True)
    rows = list(trainer.train_dataset)
    contents = [[{"type": "image", "image": row["image"]}, {"type": "text", "text": row["prompt"][0]["content"]}] for row in rows]
    prompts, _, fields = trainer._tokenize_prompts([[{"role": "user", "content": content}] for content in contents])
    assert prompts == own.token_ids.tolist()
    fields = {name: torch.as_tensor(value) for name, value in fields.items()}
    torch.testing.assert_close(fields["pixel_values"], method.vlm.layout.patches(stacked(batch.images)), rtol=0, atol=1e-5)

    tokens = torch.randint(100, 1000, (2, 4))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    whole = torch.cat([own.token_ids, tokens], 1)
    fields["mm_token_type_ids"] = torch.cat([fields["mm_token_type_ids"], torch.zeros_like(tokens)], 1)
    scored, *_ = trainer._get_per_token_logps_and_entropies(
        trainer.model, whole, torch.ones_like(whole), 4, num_images=[1, 1], **fields
    )
    torch.testing.assert_close(scored, method.log_probs(own, tokens, mask), rtol=0, atol=1e-4)


def test_no_caption_ends_early():
    head = tool.build(tool.parser().parse_args(SMALL), "ours").vlm.model.lm_head
    chances = head(torch.randn(8, 32)).softmax(-1)
    assert torch.equal(chances == 0, (head.bias < 0).expand_as(chances)) and (head.bias < 0).any()


def test_an_arm_without_its_library_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(tool, "find_spec", lambda name: None)
    monkeypatch.setattr(tool.timing, "in_turns", lambda measure, options, arms: arms)
    monkeypatch.setattr(tool, "table", " ".join)
    assert tool.main([]) == 0
    assert capsys.readouterr().out == "trl arm left out: pip install umm_zoo[trl]\nours library\n"


def test_table_gives_shares_and_the_ratios():
    turn = {**dict.fromkeys(tool.PHASES, 0.2), "samples_per_second": 4.0, "start_mb": 50.0, "peak_mb": 100.0}
    text = tool.table({"ours": turn, "library": {**turn, "samples_per_second": 2.0}, "trl": {**turn, "samples_per_second": 1.0}})
    assert "(20.0 %)" in text and text.endswith("2.00 times as fast as library, 4.00 times as fast as trl")
