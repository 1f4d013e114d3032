"""What later stages cost earlier tasks."""

from __future__ import annotations

import json

from tools import forgetting


def test_best_earlier_score_minus_the_last_and_turned_round_where_lower_is_better(tmp_path, capsys):
    for number, scores in enumerate(({"geneval/overall": 0.9, "loss": 3}, {"geneval/overall": 0.8}, {"geneval/overall": 0.85})):
        run = tmp_path / f"stage{number + 1}"
        run.mkdir()
        named = {"val/" + name: value for name, value in scores.items()} | {"val/pixels/copy_index": 0.2 + number / 10}
        (run / "metrics.json").write_text(json.dumps({"metrics": {**named, "train/loss": 1.0}}))
    runs = [str(tmp_path / f"stage{i}") for i in (1, 2, 3)]
    assert forgetting.main(runs) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| geneval/overall | 0.900 | 0.800 | 0.850 | 0.050 |" in lines
    assert "| pixels/copy_index | 0.200 | 0.300 | 0.400 | 0.200 |" in lines
    assert "| loss | 3.000 |  |  |  |" in lines and not any("train" in line for line in lines)
    assert forgetting.forgotten("scenes/extra", [0.1, 0.3, 0.5]) == 0.4 and forgetting.forgotten("flow/flow", [0.2, 0.1]) == -0.1
    assert forgetting.forgotten("text_perplexity", [17.5, 18.0]) == 0.5
    assert forgetting.main([*runs, "--metrics", "copy"]) == 0 and len(capsys.readouterr().out.splitlines()) == 3
    assert forgetting.main([str(tmp_path)]) == 2 and "metrics.json" in capsys.readouterr().err
