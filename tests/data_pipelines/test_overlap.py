import json
from pathlib import Path

import pytest
from converter_parts import error_of

from data_pipelines import overlap
from data_pipelines.overlap import PromptIndex, main, parser, read_prompts, words_of
from data_pipelines.shards.writing import write_shards

LONG = "a quiet harbour at dawn with three red boats moored along a wooden pier"


def shard(folder: Path, *answers: str) -> None:
    question = {"role": "user", "text": "<image>\nDescribe."}
    rows = [{"conversations": [question, {"role": "assistant", "text": answer}]} for answer in answers]
    write_shards(({"__key__": f"{n:04d}", "json": row, "0.png": b"never read"} for n, row in enumerate(rows)), folder, "a")


def run(*arguments: object) -> None:
    main(parser().parse_args([str(argument) for argument in arguments]))


def test_words_are_compared_without_case_punctuation_markers_and_width():
    assert words_of("<image>\nA Photo—of  “TWO” dogs, ﬁne!") == ("a", "photo", "of", "two", "dogs", "fine")
    assert words_of("\uff41 \uff50\uff48\uff4f\uff54\uff4f") == ("a", "photo")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A photo of a bench.", {0: ("equal", 1.0)}),
        ("Here is a photo of a bench, in a park", {0: ("contained", 1.0)}),
        ("here is a photo of a benchmark", {}),
        ("a dog", {1: ("equal", 1.0)}),
        ("a dog runs", {}),  # two words stand in half of all captions
        (f"It shows {LONG}!", {2: ("contained", 1.0)}),
        ("", {}),
    ],
)
def test_equal_and_contained_prompts(text, found):
    assert PromptIndex(["a photo of a bench", "A dog", LONG], min_words=5, ngram=8).find(text) == found


def test_the_share_of_a_prompt_s_sequences_decides():
    index = PromptIndex([LONG], ngram=8, threshold=0.5)  # 14 words: 7 sequences of 8
    assert index.find(" ".join(LONG.split()[:11])) == {0: ("ngram", round(4 / 7, 4))}
    assert index.find(" ".join(LONG.split()[:10])) == {}
    assert PromptIndex([LONG], ngram=8, threshold=0.4).find(" ".join(LONG.split()[:10])) == {0: ("ngram", round(3 / 7, 4))}
    assert index.find(" ".join(reversed(LONG.split()))) == {}


def test_the_report_counts_samples_and_prompts_and_shows_where(tmp_path, capsys):
    shard(tmp_path / "in", "A photo of a bench.", "No.", "See: a photo of a bench here", f"{LONG} and more", "a photo of a bench")
    (tmp_path / "prompts.txt").write_text(f"a photo of a bench\n\n{LONG}\nan orange zebra on a green car\na photo of a bench\n")
    run(tmp_path / "in", tmp_path / "prompts.txt", "--report", tmp_path / "r/overlap.json", "--examples", 2)
    report = json.loads((tmp_path / "r/overlap.json").read_text())
    assert (report["samples"], report["texts"], report["prompts"]) == (5, 10, 3)
    assert report["samples_with_overlap"] == {"equal": 2, "contained": 2, "ngram": 0}
    assert report["prompts_with_overlap"] == {"any": 2, "equal": 1, "contained": 2, "ngram": 0}
    first, second = report["overlaps"]
    assert (first["prompt"], first["equal"], first["contained"]) == ("a photo of a bench", 2, 1)
    assert [example["key"] for example in first["examples"]] == ["0000", "0002"]
    assert second["examples"][0]["where"] == "turn 1 (assistant)"
    assert "equal      2 samples, 1 prompts" in capsys.readouterr().out


def test_foreign_tars_with_captions_beside_and_unreadable_texts(tmp_path):
    samples = [{"__key__": "1", "txt": "a photo of a bench"}, {"__key__": "2", "txt": b"\xff\xfe"}, {"__key__": "3", "json": b"{"}]
    samples.append({"__key__": "4", "json": b'{"caption": "A photo of a bench"}'})
    write_shards(samples, tmp_path / "in", "a")
    (tmp_path / "prompts.txt").write_text("a photo of a bench")
    run(tmp_path / "in", tmp_path / "prompts.txt", "--report", tmp_path / "overlap.json")
    report = json.loads((tmp_path / "overlap.json").read_text())
    assert report["unreadable_samples"] == 2 and report["overlaps"][0]["equal"] == 2


def test_prompts_are_read_from_json_lines_and_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"tag": "x", "prompt": "One two."}\n{"tag": "y", "prompt": "Three"}\n')
    (tmp_path / "folder").mkdir()
    for name in ("a", "b"):
        (tmp_path / f"folder/{name}.txt").write_text(f"Prompt\n{name}")
    assert read_prompts(tmp_path / "a.jsonl") == ["One two.", "Three"]
    assert read_prompts(tmp_path / "folder") == ["Prompt\na", "Prompt\nb"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["in", "nowhere.txt"], "nowhere.txt: no such file or folder of prompts"),
        (["in", "empty.txt"], "empty.txt: found no prompt"),
        (["in", "bad.txt"], "bad.txt: not UTF-8"),
        (["in", "other.jsonl"], "other.jsonl: row 0 has no text under 'prompt', found text"),
        (["in", "cut.jsonl"], "cut.jsonl: json cannot be parsed"),
        (["elsewhere", "good.txt"], "elsewhere: no shard (*.tar) found there"),
        (["in", "good.txt", "--threshold", "0"], "--threshold: found 0"),
        (["in", "good.txt", "--ngram", "0"], "--ngram: found 0"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    shard(tmp_path / "in", "A photo.")
    files = {"empty.txt": b"\n", "bad.txt": b"\xff\xfe", "other.jsonl": b'{"text": "a"}', "good.txt": b"a photo"}
    for name, content in {**files, "cut.jsonl": b'{"prompt": "a'}.items():
        Path(name).write_bytes(content)
    assert message in error_of(overlap, arguments, capsys)
