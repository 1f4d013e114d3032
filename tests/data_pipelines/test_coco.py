import json
from collections import Counter
from pathlib import Path

import pytest
from converter_parts import convert, error_of, samples_in
from PIL import Image

from data_pipelines.converters import coco as command
from data_pipelines.converters.coco import article, plural
from data_pipelines.converters.coco_lists import Objects, RowsOfList

NAMES = ["person", "dog", "cat", "car", "scissors", "bus", "cup", "fork"]
#: Objects per image: the first four are of more than three kinds.
THERE = {
    7: ["person", "person", "dog", "cat", "car"],
    8: ["person", "dog", "cat", "cup"],
    9: ["person", "car", "bus", "cup", "cup", "cup"],
    10: ["person", "dog", "car", "fork"],
    11: ["person"] * 12,
    12: ["dog"],
}


def coco(folder: Path, split: str = "val2017", captions: bool = True, instances: bool = True) -> None:
    (folder / "annotations").mkdir(parents=True)
    (folder / split).mkdir()
    images = [{"id": image, "file_name": f"{image:012d}.jpg", "width": 20, "height": 10} for image in THERE]
    for image in images:
        Image.new("RGB", (20, 10), (image["id"], 50, 99)).save(folder / split / image["file_name"])
    if captions:
        rows = [{"id": 10 * i + n, "image_id": i, "caption": f"Caption {n} of {i}. "} for i in THERE for n in range(5)]
        (folder / f"annotations/captions_{split}.json").write_text(json.dumps({"images": images, "annotations": rows}))
    if instances:
        rows = [{"image_id": i, "category_id": 2 + NAMES.index(name), "iscrowd": 0} for i, names in THERE.items() for name in names]
        rows.append({"image_id": 12, "category_id": 2 + NAMES.index("person"), "iscrowd": 1})
        categories = [{"id": 2 + number, "name": name, "supercategory": "x"} for number, name in enumerate(NAMES)]
        content = {"images": images, "annotations": rows, "categories": categories}
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def objects_of(folder: Path, categories: list[dict], annotations: list[dict], images: tuple[dict, ...] = ()) -> Objects:
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "list.json").write_text(json.dumps(content))
    return Objects.of(RowsOfList(folder / "list.json", tuple(content), {}))


def test_an_image_has_one_of_its_captions_and_knows_the_others(tmp_path):
    coco(tmp_path / "in", instances=False)
    report = convert(command, tmp_path / "in", tmp_path / "out")
    assert report["samples"] == {"val2017/captions": 6}
    for row in samples_in(tmp_path / "out/val2017/captions-*.tar"):
        image = row["image_id"]
        assert row["captions"] == [f"Caption {n} of {image}." for n in range(5)]
        assert row["conversations"][1]["text"] in row["captions"]
        assert row["members"]["0.jpg"] == (tmp_path / "in/val2017" / row["file"]).read_bytes()
    assert convert(command, tmp_path / "in", tmp_path / "all", "--all-captions")["samples"] == {"val2017/captions": 30}


def test_existence_questions_are_balanced_and_true_in_every_setting(tmp_path):
    coco(tmp_path / "in", captions=False)
    convert(command, tmp_path / "in", tmp_path / "out", "--pairs", 2, "--without", "count")
    asked = samples_in(tmp_path / "out/val2017/exists-*.tar")
    assert Counter(row["image_id"] for row in asked) == {image: 12 for image in (7, 8, 9, 10)}
    answers = Counter((row["negative"], row["conversations"][1]["text"]) for row in asked)
    assert set(answers.values()) == {8} and len(answers) == 6
    assert all((row["conversations"][1]["text"] == "yes") == (row["object"] in THERE[row["image_id"]]) for row in asked)
    text = next(row["conversations"][0]["text"] for row in asked if row["object"] == "dog")
    assert text == "<image>\nIs there a dog in the image?"


def test_popular_and_adversarial_absent_objects_are_pope_s(tmp_path):
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    there = {1: ["cup", "fork"], 2: ["cup", "fork"], 3: ["person", "car"], 4: ["person", "car"], 5: ["person"], 6: ["cup"]}
    annotations = [{"image_id": i, "category_id": NAMES.index(name)} for i, names in there.items() for name in names]
    objects = objects_of(tmp_path, categories, annotations)
    assert objects.popular(6)[:3] == ["person", "car", "fork"]  # in 3, 2 and 2 images
    assert objects.adversarial(6)[0] == "fork"  # the only one seen with a cup
    assert objects.absent(1) == ["bus", "car", "cat", "dog", "person", "scissors"]


def test_counting_skips_crowds_and_large_numbers(tmp_path):
    coco(tmp_path / "in", captions=False)
    convert(command, tmp_path / "in", tmp_path / "out", "--without", "exists", "--count-images", 0)
    asked = {row["image_id"]: row for row in samples_in(tmp_path / "out/val2017/count-*.tar")}
    assert sorted(asked) == [7, 8, 9, 10, 12]  # twelve people are too many to count
    assert all(row["conversations"][1]["text"] == str(THERE[image].count(row["object"])) for image, row in asked.items())
    assert asked[12]["object"] == "dog"
    assert asked[12]["conversations"][0]["text"] == "<image>\nHow many dogs are in the image?"


def test_single_objects_beside_a_crowd_of_their_kind_cannot_be_counted(tmp_path):
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "person"}]
    annotations = [{"image_id": 5, "category_id": kind, "iscrowd": crowd} for kind, crowd in ((1, 0), (1, 0), (2, 0), (2, 1))]
    objects = objects_of(tmp_path, categories, annotations)
    assert objects.countable(5, most=9) == {"dog": 2} and objects.present(5) == {"dog", "person"}
    assert not objects.countable(5, most=1)


def test_limits_choose_images_and_missing_ones_are_reported(tmp_path):
    coco(tmp_path / "in")
    (tmp_path / "in/val2017/000000000012.jpg").unlink()
    report = convert(command, tmp_path / "in", tmp_path / "out", "--exists-images", 2, "--count-images", 1, "--images-per-shard", 4)
    assert (report["samples"]["val2017/captions"], report["samples"]["val2017/exists"]) == (5, 36)
    assert report["left_out_items"]["val2017/captions/12"] == "missing image: 000000000012.jpg"
    assert report["shards"]["val2017/captions"] == 2


def test_images_may_lie_elsewhere_and_splits_be_chosen(tmp_path):
    coco(tmp_path / "in")
    (tmp_path / "in/val2017").rename(tmp_path / "photos")
    options = ("--images", tmp_path / "photos", "--splits", "val2017", "--without", "exists", "count")
    report = convert(command, tmp_path / "in", tmp_path / "out", *options)
    assert report["samples"] == {"val2017/captions": 6}


def test_names_read_well_in_questions():
    assert [article(name) for name in ("apple", "skis", "dog")] == ["an apple", "a pair of skis", "a dog"]
    asked = ["person", "wine glass", "bench", "toothbrush", "berry", "toy"]
    assert [plural(name) for name in asked] == ["people", "wine glasses", "benches", "toothbrushes", "berries", "toys"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda at: None, ["--splits", "val2014"], "--splits: found 'val2014', expected val2017"),
        (lambda at: (at / "val2017").rename(at / "elsewhere"), [], "no such folder of images"),
        (lambda at: [path.unlink() for path in (at / "annotations").iterdir()], [], "neither captions_*.json nor instances_*.json"),
        (lambda at: (at / "annotations/captions_val2017.json").write_text("[]"), [], "the list 'images' is missing"),
        (lambda at: (at / "annotations/instances_val2017.json").write_text("{"), [], "cannot be parsed"),
        (lambda at: None, ["--pairs", "0"], "--pairs: found 0"),
    ],
)
def test_user_errors_are_one_line(tmp_path, capsys, change, options, message):
    coco(tmp_path / "in")
    change(tmp_path / "in")
    assert message in error_of(command, [tmp_path / "in", tmp_path / "out", *options], capsys)


def lists(folder: Path, images: list, annotations: list, *files: str, name: str = "captions_mine") -> Path:
    """A list of one's own with its images."""
    for file in files:
        (folder / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(folder / "in" / file)
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"in/{name}.json").write_text(json.dumps(content))
    return folder / "in"


def captions_of(folder: Path) -> dict:
    convert(command, folder / "in", folder / "out")
    return {row["image_id"]: (row["file"], row["captions"]) for row in samples_in(folder / "out/mine/captions-*.tar")}


@pytest.mark.parametrize(("listed", "said"), [(7, 7.0), ("7", 7), (7.0, "7"), ("a.b/c", "a.b/c"), (10**40, 10**40), (-7, "-7")])
def test_ids_of_any_writing_find_their_image(tmp_path, listed, said):
    lists(tmp_path, [{"id": listed, "file_name": "1.jpg"}], [{"image_id": said, "caption": "a dog"}], "mine/1.jpg")
    if said == "-7":  # no number as COCO writes one, so another id
        with pytest.raises(ValueError, match="nothing could be converted"):
            captions_of(tmp_path)
    else:
        assert list(captions_of(tmp_path).values()) == [("1.jpg", ["a dog"])]


@pytest.mark.parametrize(
    ("image", "file"),
    [
        ({"file_name": "mine/1.jpg"}, "mine/1.jpg"),
        ({"file_name": "photos/1.jpg"}, "photos/1.jpg"),
        ({"coco_url": "http://images.cocodataset.org/train2017/1.jpg"}, "train2017/1.jpg"),
        ({"file_name": "1.jpg", "coco_url": "http://a/b/c.jpg"}, "mine/1.jpg"),
        ({"file_name": None, "coco_url": "http://a/photos/1.jpg"}, "photos/1.jpg"),
    ],
)
def test_names_may_hold_a_folder_or_be_an_address(tmp_path, image, file):
    lists(tmp_path, [{"id": 1, **image}], [{"image_id": 1, "caption": "a dog"}], file)
    captions_of(tmp_path)
    (row,) = samples_in(tmp_path / "out/mine/captions-*.tar")
    assert row["members"]["0.jpg"] == (tmp_path / "in" / file).read_bytes()


def test_an_id_of_two_images_gives_neither_the_captions_of_the_other(tmp_path):
    images = [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}, {"id": 1.0, "file_name": "3.jpg"}]
    rows = [{"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": "a cat"}, {"image_id": 1, "caption": "a cup"}]
    lists(tmp_path, images, rows, "mine/1.jpg", "mine/2.jpg", "mine/3.jpg")
    assert captions_of(tmp_path) == {2: ("2.jpg", ["a cat"])}


@pytest.mark.parametrize("caption", [None, "", "  ", "<image>", 3, ["a dog"], {"a": "dog"}, True])
def test_what_is_no_caption_never_becomes_a_text(tmp_path, caption):
    rows = [{"image_id": 1, "caption": caption}, {"image_id": 1, "caption": "a dog"}, {"image_id": 2, "caption": caption}]
    lists(tmp_path, [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)], rows, "mine/1.jpg", "mine/2.jpg")
    assert captions_of(tmp_path) == {1: ("1.jpg", ["a dog"])}
    assert json.loads((tmp_path / "out/report.json").read_text())["reasons"] == {"no caption": 3}  # two rows, and image 2


def test_objects_that_were_not_looked_for_are_not_asked_for(tmp_path):
    images = ({"id": 1, "neg_category_ids": [1, 7], "not_exhaustive_category_ids": [2]},)
    annotations = [{"image_id": 1, "category_id": kind} for kind in (0, 2, 2)]
    objects = objects_of(tmp_path, [{"id": number, "name": name} for number, name in enumerate(NAMES)], annotations, images)
    assert objects.absent(1) == ["dog", "fork"] and objects.countable(1, most=9) == {"person": 1}


@pytest.mark.parametrize("bad", [{"category_id": 99}, {"category_id": None}, {"category_id": 8}])
def test_nothing_is_asked_about_an_image_with_an_object_that_nobody_can_name(tmp_path, bad):
    names = [*enumerate(NAMES), (8, "one name"), (8, "another")]
    annotations = [{"image_id": image, "category_id": 0} for image in (1, 2)] + [{"image_id": 2, **bad}]
    objects = objects_of(tmp_path, [{"id": number, "name": name} for number, name in names], annotations)
    assert objects.incomplete == {2}


def test_an_annotation_that_stands_twice_counts_once(tmp_path):
    annotations = [{"id": number, "image_id": 1, "category_id": 1} for number in (5, 5, 6)]
    objects = objects_of(tmp_path, [{"id": 1, "name": "dog"}], annotations)
    assert objects.counts[1] == {"dog": 2}


def test_existence_questions_are_pope_s_files_too(tmp_path):
    coco(tmp_path / "in", captions=False)
    (tmp_path / "in/val2017/000000000008.jpg").unlink()
    convert(command, tmp_path / "in", tmp_path / "out", "--pairs", 2, "--without", "count")
    asked = [row for row in samples_in(tmp_path / "out/val2017/exists-*.tar") if row["negative"] == "popular"]
    rows = [json.loads(line) for line in (tmp_path / "out/val2017/pope_popular.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in rows] == list(range(1, 13))  # of 3 images, 4 each
    found = [(row["image"], f"<image>\n{row['text']}", row["label"]) for row in rows]
    assert found == [(row["file"], *row["turns"]) for row in asked]
