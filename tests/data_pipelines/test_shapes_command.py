import io
import json

import pytest
from PIL import Image

from data_pipelines.shapes import main
from data_pipelines.shards.index import load_index
from umm_zoo.shapes.samples import make_sample
from umm_zoo.shapes.scenes import World

FEW = ["--train", "5", "--val", "3", "--test", "2", "--samples-per-shard", "4"]


def read(tar):
    content = tar.read_bytes()
    index = load_index(str(tar))
    for number, key in enumerate(index.keys()):
        yield key, {name: content[at : at + size] for name, at, size in index.members(number)}


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_part_is_written_and_reads_back(tmp_path):
    assert main([str(tmp_path), *FEW, "--seed", "3"]) == 0
    world = json.loads((tmp_path / "world.json").read_text())
    assert World(**world["world"]) == World() and world["seed"] == 3
    for name, part in world["parts"].items():
        split, task = name.split("/")
        shards = sorted((tmp_path / split).glob(f"{task}-*.tar"))
        samples = [sample for shard in shards for sample in read(shard)]
        assert (len(samples), len(shards)) == (part["samples"], part["shards"]) and sum(part["kinds"].values()) == len(samples)
        for i, (key, members) in enumerate(samples):
            expected = make_sample(World(), 3, split, task, i)
            row = json.loads(members["json"])
            assert key == expected.key and row == expected.row
            assert row["conversations"][0]["text"].count("<image>") == len(expected.scenes)
            images = {member for member in members if member != "json"}
            assert images == {f"{k}.png" for k in range(len(expected.scenes))} | ({"target.png"} if expected.target else set())
            assert bool(images) == (task not in ("readings", "facts"))
            assert {Image.open(io.BytesIO(members[image])).size for image in images} <= {(32, 32)}
    assert {name.split("/")[0] for name in world["parts"]} == {"train", "val", "test", "heldout", "hybrid"}
    assert "train/pairs" not in world["parts"] and world["parts"]["val/pairs"]["samples"] == 4
    assert Image.open(tmp_path / "contact_sheet.png").size[0] > 500


def test_same_arguments_give_the_same_bytes_in_one_run_or_two(tmp_path):
    assert main([str(tmp_path / "a"), *FEW, "--tasks", "captions,edits"]) == 0
    assert main([str(tmp_path / "b"), *FEW, "--tasks", "edits"]) == 0
    assert main([str(tmp_path / "b"), *FEW, "--tasks", "captions,edits"]) == 0
    ours, theirs = tree(tmp_path / "a"), tree(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name] and name != "world.json"] == []


def test_a_second_run_says_that_all_was_there(tmp_path, capsys):
    command = [str(tmp_path), *FEW, "--tasks", "captions"]
    assert main(command) == 0
    before = tree(tmp_path)
    assert main(command) == 0
    assert tree(tmp_path) == before and "everything was there already" in capsys.readouterr().out


def test_overwriting_leaves_nothing_of_the_old_world(tmp_path):
    assert main([str(tmp_path), *FEW, "--tasks", "captions,edits"]) == 0
    other = ["--overwrite", "--cells", "3", "--train", "2", "--val", "0", "--test", "0", "--tasks", "captions"]
    assert main([str(tmp_path), *other]) == 0
    assert sorted(name for name in tree(tmp_path) if name.endswith(".tar")) == ["train/captions-000000.tar"]
    assert list(json.loads((tmp_path / "world.json").read_text())["parts"]) == ["train/captions"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--colours", "3"], "num_colours: found 3, expected 4"),
        (["--cells", "two"], "--cells: invalid int value: 'two'"),
        (["--tasks", "captions,quest"], "found 'quest', expected captions"),
        (["--train", "-1"], "--train: found -1, expected a whole number from 0 on"),
        (["--mark-share", "1.5"], "--mark-share: found 1.5"),
        (["--samples-per-shard", "0"], "--samples-per-shard: found 0"),
        (["--train", "0", "--val", "0", "--test", "0"], "nothing to write"),
        (["--detail", "spot"], "detail: found 'spot', expected mark, stripes, glyph"),
        (["--sead", "1"], "unrecognized arguments: --sead"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_two(tmp_path, capsys, arguments, words):
    try:
        code = main([str(tmp_path / "out"), *arguments])
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr().err
    assert code == 2 and words in said and said.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [["--seed", "1"], ["--cells", "3"], ["--train", "6"]])
def test_another_world_is_not_mixed_in(tmp_path, capsys, change):
    command = [str(tmp_path), *FEW, "--tasks", "captions"]
    assert main(command) == 0
    before = tree(tmp_path)
    assert main([*command, *change]) == 2
    assert "--overwrite" in capsys.readouterr().err and tree(tmp_path) == before


@pytest.mark.parametrize("task", ["questions", "dialogues"])
def test_another_share_of_marks_is_not_mixed_in(tmp_path, capsys, task):
    command = [str(tmp_path), *FEW, "--tasks", task]
    assert main([*command, "--mark-share", "0.5"]) == 0
    before = tree(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "'mark_share': 0.5" in said and "'mark_share': 0.2" in said and tree(tmp_path) == before


def test_a_folder_that_does_not_tell_its_share_of_marks_is_kept_and_named(tmp_path, capsys):
    command = [str(tmp_path), *FEW, "--tasks", "dialogues"]
    assert main([*command, "--mark-share", "0.5"]) == 0
    file = tmp_path / "world.json"
    former = json.loads(file.read_text())
    for part in former["parts"].values():
        del part["mark_share"]
    file.write_text(json.dumps(former))
    assert main(command) == 0
    assert "train/dialogues is kept as it is; nothing tells its mark_share" in capsys.readouterr().err
    assert json.loads(file.read_text())["parts"] == former["parts"]


def test_a_world_of_few_scenes_is_said_to_be_one(tmp_path, capsys):
    plain = ["--detail", "none", "--max-jitter", "0", "--plain", "--tasks", "text_to_image"]
    assert main([str(tmp_path / "one"), *FEW, *plain, "--max-objects", "1", "--train", "300"]) == 0
    assert "at most 256 different images, for up to 300 samples" in capsys.readouterr().err  # 4 cells, 16 looks, 4 backgrounds
    assert main([str(tmp_path / "two"), *FEW, *plain, "--max-objects", "2", "--train", "300"]) == 0
    assert "note" not in capsys.readouterr().err
