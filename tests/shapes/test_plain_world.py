"""The world without stripes, jitter and fine detail, beside which that of before stays as it was."""

import hashlib
import json

import numpy as np
import pytest
import torch
from oracles import BIG, oracle

from data_pipelines.shapes import main
from data_pipelines.shards.batches import to_signal
from umm_zoo.errors import UserError
from umm_zoo.shapes import SPLITS, TASKS, World, make_sample, render, sample_scene, sample_stream
from umm_zoo.shapes.detector import ShapesDetector
from umm_zoo.shapes.patches import ShapesCodebook, patches_of

PLAIN = World(striped=False, max_jitter=0, detail="none")
LATER = ("facts", "implied", "refinements")  # tasks that came after the digests were taken
PATCHES = 4 * (1 + 4 * 4 * 2 * 2)  # each background flat, and under each quarter of each object


def scenes(split, count, world=PLAIN):
    return [sample_scene(world, split, sample_stream(7, split, "plain", i)) for i in range(count)]


def images_of(rendered, world):
    """As a loader makes floats of bytes."""
    return to_signal(torch.from_numpy(np.stack([render(world, scene) for scene in rendered])))


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        (World(), "4fb42c4c8d074ab9"),
        (World(cells=3, num_colours=8, num_shapes=4, max_objects=4, image_size=64, detail="glyph"), "93cbc31d00bc7513"),
        (World(detail="stripes", sizes=("large",)), "0a98b56be6667f46"),
    ],
)
def test_no_sample_of_the_other_worlds_has_changed_by_a_byte(world, expected):
    """Digests of commit 7619764, which knew no plain world; of pixels, for how a PNG packs them is the library's affair."""
    digest = hashlib.sha256()
    for task in [task for task in TASKS if task not in LATER]:
        for index in range(6):
            sample = make_sample(world, 3, "hybrid" if task == "hybrid_edits" else "val", task, index)
            digest.update(sample.key.encode() + json.dumps(sample.row).encode())
            for scene in (*sample.scenes, *([sample.target] if sample.target else [])):
                digest.update(render(world, scene).tobytes())
    assert digest.hexdigest()[:16] == expected


def test_every_task_but_pairs_exists_and_no_question_is_about_a_mark():
    for task in (task for task in TASKS if task != "pairs"):
        for split in SPLITS:
            if (task == "hybrid_edits") == (split == "hybrid"):
                for index in range(12):
                    sample = make_sample(PLAIN, 1, split, task, index)
                    shown = [*sample.scenes, *([sample.target] if sample.target else [])]
                    objects = [item for scene in shown for item in scene.objects]
                    assert not any(scene.stripes for scene in shown)
                    assert not any(item.mark or any(item.jitter) for item in objects)
                    assert "mark" not in json.dumps(sample.row["conversations"])


def test_questions_have_their_one_answer():
    for index in range(200):
        row = make_sample(PLAIN, 0, "test", "questions", index).row
        question, answer = (turn["text"] for turn in row["conversations"])
        assert oracle(row["scene"], question.removeprefix("<image>\n")) == answer


@pytest.mark.parametrize(("task", "share"), [("pairs", None), ("questions", 0.1)])
def test_what_needs_a_fine_detail_is_refused(task, share):
    with pytest.raises(UserError, match=f"{task} that need the fine detail of objects, expected a World.detail"):
        make_sample(PLAIN, 0, "test", task, 0, mark_share=share)


def test_the_detector_is_right_on_every_scene():
    rendered = scenes("train", 150) + scenes("heldout", 150)
    assert ShapesDetector(detail="none", max_jitter=0)(images_of(rendered, PLAIN)) == rendered


def test_the_codebook_holds_each_patch_once_and_loses_nothing():
    codec = ShapesCodebook(PLAIN)
    assert codec.num_codes == PATCHES == len({tuple(patch.flatten().tolist()) for patch in codec.patches})
    rendered = [scene for split in ("train", "test", "heldout") for scene in scenes(split, 300)]
    images = images_of(rendered, PLAIN)
    codes = codec.codes(images)
    assert codes.shape == (900, 16, 1) and torch.equal(codec.images(codes), images)
    assert torch.equal(ShapesCodebook(World(striped=False, max_jitter=0, detail="none")).patches, codec.patches)


def test_a_larger_world_has_a_codebook_of_its_own():
    world = World(striped=False, max_jitter=0, detail="none", image_size=64, num_colours=5, num_shapes=3)
    images = images_of(scenes("train", 40, world), world)
    for patch, cells in ((8, 64), (16, 16)):
        codec = ShapesCodebook(world, patch)
        codes = codec.codes(images)
        assert codes.shape == (40, cells, 1) and torch.equal(codec.images(codes), images)


@pytest.mark.parametrize(
    ("world", "patch", "words"),
    [
        (World(max_jitter=0, detail="none"), 8, "World.striped: found True, expected False"),
        (World(striped=False, detail="none", max_jitter=1), 8, "World.max_jitter: found 1, expected 0"),
        (World(striped=False, max_jitter=0), 8, "World.detail: found mark, expected none"),
        (World(cells=3, striped=False, max_jitter=0, detail="none"), 8, "patch: found 8, expected a divisor of .* 0, 11, 21, 32"),
    ],
)
def test_worlds_without_a_lossless_codebook_say_why(world, patch, words):
    with pytest.raises(UserError, match=words):
        patches_of(world, patch)


def test_the_command_writes_it_once(tmp_path, capsys):
    plain = ["--detail", "none", "--max-jitter", "0", "--plain"]
    few = ["--train", "2", "--val", "2", "--test", "0"]
    assert main([str(tmp_path), *few, *plain]) == 0
    world = json.loads((tmp_path / "world.json").read_text())
    assert World(**world["world"]) == PLAIN and not any("pairs" in part for part in world["parts"])
    assert world["parts"]["val/questions"]["mark_share"] == 0
    assert main([str(tmp_path), *few, *plain]) == 0
    assert main([str(tmp_path), *few]) == 2
    assert "--overwrite" in capsys.readouterr().err


def test_a_world_written_before_there_was_a_plain_one_is_known_again(tmp_path, capsys):
    words = [str(tmp_path), "--train", "2", "--val", "0", "--test", "0", "--tasks", "captions"]
    assert main(words) == 0
    file = tmp_path / "world.json"
    former = json.loads(file.read_text())
    for name in ("striped", "max_jitter"):
        del former["world"][name]
    file.write_text(json.dumps(former))
    assert main(words) == 0 and "everything was there already" in capsys.readouterr().out


def test_splits_are_those_of_the_world_with_marks():
    for scene in scenes("val", 20):
        assert scene.coarse() not in {other.coarse() for other in scenes("train", 300, World())}
    assert BIG.stripes != PLAIN.stripes == ("",)
    assert np.ptp(render(PLAIN, type(scenes("val", 1)[0])("slate", "", ())), axis=(0, 1)).max() == 0
