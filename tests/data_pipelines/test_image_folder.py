import io
import json
from collections import Counter
from pathlib import Path

import pytest
from converter_parts import convert, error_of, photo, samples_in
from PIL import Image

from data_pipelines.converters import image_folder
from data_pipelines.converters.texts import with_article


def photos(folder: Path, counts: dict[str, int], size: tuple[int, int] = (9, 6)) -> None:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            (folder / name / f"{number}.png").write_bytes(photo(number, "PNG", size))


def rows(pattern: Path) -> list[tuple[str, str, dict]]:
    return [(*sample["turns"], sample) for sample in samples_in(pattern)]


def test_each_photo_is_a_question_two_balanced_yes_no_questions_and_a_caption(tmp_path):
    photos(tmp_path / "in/train", {"airplane": 5, "sea_lion": 4})
    photos(tmp_path / "in/test", {"airplane": 1, "sea_lion": 2})
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--photos-per-shard", 4)
    questions = rows(tmp_path / "out/train/questions-*.tar")
    assert Counter(meta["kind"] for _, _, meta in questions) == {"class": 9, "exists": 18}
    assert Counter(answer for _, answer, meta in questions if meta["kind"] == "exists") == {"yes": 9, "no": 9}
    assert all(answer == meta["class"] for _, answer, meta in questions if meta["kind"] == "class")
    assert all((answer == "yes") == (meta["object"] == meta["class"]) for _, answer, meta in questions if meta["kind"] == "exists")
    captions = Counter(answer for _, answer, _ in rows(tmp_path / "out/test/captions-*.tar"))
    assert captions == {"A photo of an airplane.": 1, "A photo of a sea lion.": 2}


def test_without_splits_a_share_is_held_out_and_stays_out_when_photos_are_added(tmp_path):
    photos(tmp_path / "in", {"cat": 40, "dog": 40})
    convert(image_folder, tmp_path / "in", tmp_path / "a", "--val-share", 0.3)
    before = {meta["file"] for _, _, meta in rows(tmp_path / "a/val/captions-*.tar")}
    assert 10 <= len(before) <= 40
    photos(tmp_path / "in", {"eel": 10})
    convert(image_folder, tmp_path / "in", tmp_path / "b", "--val-share", 0.3)
    assert before == {meta["file"] for _, _, meta in rows(tmp_path / "b/val/captions-*.tar") if meta["class"] != "eel"}


def test_damaged_files_are_left_out_and_named(tmp_path, capsys):
    photos(tmp_path / "in", {"cat": 3, "dog": 3})
    (tmp_path / "in/dog/1.png").write_bytes((tmp_path / "in/dog/1.png").read_bytes()[:50])
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert len(rows(tmp_path / "out/train/captions-*.tar")) == 5
    report = json.loads((tmp_path / "out/conversion.json").read_text())
    assert list(report["shards"]["train/captions-000000"]["left_out"]) == ["dog/1.png"]
    assert "dog/1.png: image cannot be decoded" in capsys.readouterr().out


def test_shrinking_keeps_the_aspect_ratio_and_never_enlarges(tmp_path):
    photos(tmp_path / "in", {"cat": 2}, (40, 20))
    photos(tmp_path / "in", {"dog": 2}, (8, 8))
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0, "--image-size", 10)
    found = samples_in(tmp_path / "out/train/captions-000000.tar")
    sizes = Counter(Image.open(io.BytesIO(sample["members"]["0.png"])).size for sample in found)
    assert sizes == {(20, 10): 2, (8, 8): 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere: no such folder"),
        (["one", "out"], "found one class, 'cat'"),
        (["empty", "out"], "no images in class folders"),
        (["two", "full"], "not empty and holds no conversion"),
        (["two", "out", "--val-share", "1"], "--val-share: found 1,"),
        (["two", "out", "--image-size", "0"], "--image-size: found 0"),
        (["two"], "the following arguments are required: OUT"),
        (["two", "out", "--names", "full/mine.txt"], "full/mine.txt: cannot be parsed"),
    ],
)
def test_user_errors_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    photos(tmp_path / "one", {"cat": 2})
    photos(tmp_path / "two", {"cat": 1, "dog": 1})
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("keep me")
    monkeypatch.chdir(tmp_path)
    assert message in error_of(image_folder, arguments, capsys)


def test_another_conversion_in_the_same_folder_is_refused_until_overwritten(tmp_path):
    photos(tmp_path / "in", {"cat": 2, "dog": 2})
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    with pytest.raises(ValueError, match="other arguments"):
        convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0, "--seed", 1)
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0, "--seed", 1, "--overwrite")


def test_the_article_follows_the_sound():
    nouns = ["airplane", "dog", "unicorn", "hourglass", "ibex", "European mole", "umbrella"]
    assert [with_article(noun).split()[0] for noun in nouns] == ["an", "a", "a", "an", "an", "a", "an"]


def test_classes_that_differ_by_case_or_joints_alone_are_one(tmp_path):
    photos(tmp_path / "in", {"Sea_lion": 2, "sea-lion": 2, "SEA LION": 1, "cat": 2})
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    found = rows(tmp_path / "out/train/questions-*.tar")
    assert {meta["class"] for _, _, meta in found} == {"SEA LION", "cat"}
    assert all((answer == "yes") == (meta["object"] == meta["class"]) for _, answer, meta in found if meta["kind"] == "exists")


def test_hidden_and_system_folders_are_no_classes(tmp_path):
    photos(tmp_path / "in", {"cat": 2, "dog": 2, "__MACOSX": 1, ".cache": 1, "dog/.old": 1, "dog/__MACOSX": 1, "dog/close": 1})
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert {meta["class"] for _, _, meta in rows(tmp_path / "out/train/captions-*.tar")} == {"cat", "dog"}
    assert report["samples"]["train/captions"] == 5 and report["reasons"] == {"hidden file": 4}


def test_a_folder_called_train_with_photos_in_it_is_a_class(tmp_path):
    photos(tmp_path / "in", {"train": 2, "bus": 2})
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    assert report["samples"]["train/captions"] == 4 and not report["left_out"]


def test_names_of_files_that_are_not_utf_8_are_written_as_escapes(tmp_path):
    photos(tmp_path / "in", {"cat": 1, "dog": 1})
    (tmp_path / "in/cat/0.png").rename(tmp_path / "in/cat/caf\udce9.png")
    report = convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    files = {meta["file"] for _, _, meta in rows(tmp_path / "out/train/captions-*.tar")}
    assert files == {"cat/caf\\udce9.png", "dog/0.png"} and not report["left_out"]


@pytest.mark.parametrize("names", ["[]", '{"cat": null}', '{"cat": ["a"]}', '{"cat": " "}'])
def test_names_that_are_no_texts_are_one_line(tmp_path, capsys, names):
    photos(tmp_path / "in", {"cat": 1, "dog": 1})
    (tmp_path / "names.json").write_text(names)
    assert "--names: found no map" in error_of(
        image_folder, [tmp_path / "in", tmp_path / "out", "--names", tmp_path / "names.json"], capsys
    )


@pytest.mark.parametrize("table", ["metadata.jsonl", "captions.csv", "cat/labels.tsv"])
def test_a_table_beside_the_images_is_said_not_to_be_read(tmp_path, capsys, table):
    for name in ("cat/1.jpg", "dog/2.jpg"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(photo())
    (tmp_path / "in" / table).write_text("image,caption")
    convert(image_folder, tmp_path / "in", tmp_path / "out", "--val-share", 0)
    said = f"`python -m data_pipelines.table {tmp_path / 'in' / table} OUT` converts it"
    assert f"{table}: not read" in (printed := capsys.readouterr().err) and said in printed


def test_a_flat_folder_with_a_table_is_one_line_that_names_the_command(tmp_path, capsys):
    (tmp_path / "1.jpg").write_bytes(photo())
    (tmp_path / "metadata.csv").write_text("file_name,text")
    line = error_of(image_folder, [tmp_path, tmp_path / "out"], capsys)
    assert "no images in class folders" in line and f"table {tmp_path / 'metadata.csv'} OUT` converts it" in line
