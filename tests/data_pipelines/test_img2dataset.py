import io
import json
from pathlib import Path

import pytest
from converter_parts import convert, loaded, photo, read_tar, same_files
from PIL import Image
from test_shards import write_tar

from data_pipelines.converters import img2dataset


def shard(folder: Path, number: int, keys: int, **stats: int) -> None:
    """As img2dataset lays it out: jpg, txt, json per success; the failures are in the statistics alone."""
    samples = {}
    for place in range(keys):
        key = f"{number:05d}{place:04d}"
        meta = {"url": f"http://a/{key}", "caption": f"text {key}", "key": key, "status": "success", "error_message": None}
        meta |= {"width": 30, "height": 20, "original_width": 60, "exif": "{}", "sha256": "0" * 64}
        members = {"jpg": photo(place, size=(30, 20)), "json": json.dumps(meta, indent=4).encode()}
        samples[key] = {**members, "txt": f"text {key}".encode()}
    write_tar(folder / f"{number:05d}.tar", samples)
    if stats:
        content = {"count": keys + sum(stats.values()), "successes": keys, "failed_to_download": 0, "failed_to_resize": 0, **stats}
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({**content, "status_dict": {"success": keys}}))


def rewrite(path: Path, key: str, **changes: bytes | None) -> None:
    samples = dict(read_tar(path))
    samples[key] = {kind: content for kind, content in (samples[key] | changes).items() if content is not None}
    write_tar(path, samples)


def test_downloads_become_captions_and_failures_are_counted(tmp_path):
    shard(tmp_path / "in", 0, 3, failed_to_download=4, failed_to_resize=1)
    shard(tmp_path / "in", 1, 2, failed_to_download=2)
    report = convert(img2dataset, tmp_path / "in", tmp_path / "out")
    assert report["samples"] == {"train/captions": 5} and report["shards"] == {"train/captions": 2} and report["left_out"] == 0
    assert report["notes"] == {
        "address that failed to download (by _stats.json, never in the tar)": 6,
        "address that failed to resize (by _stats.json, never in the tar)": 1,
    }
    batch = loaded(str(tmp_path / "out/train"))
    assert batch.answers()[:2] == ["text 000000000", "text 000000001"]
    meta = batch.meta[4]
    assert (meta["origin"], meta["url"], meta["original_width"]) == ("00001.tar/000010001", "http://a/000010001", 60)
    assert not {"status", "caption", "key", "exif", "error_message"} & set(meta)


def test_rows_that_failed_or_lost_a_member_are_left_out_with_their_reason(tmp_path):
    shard(tmp_path / "in", 0, 6, failed_to_download=1)
    tar = tmp_path / "in/00000.tar"
    rewrite(tar, "000000000", jpg=None)
    rewrite(tar, "000000001", json=b'{"status": "failed_to_resize", "error_message": "image decoding error"}', jpg=None)
    rewrite(tar, "000000002", txt=None)  # the caption is in the json too
    rewrite(tar, "000000003", jpg=photo(1)[:300])
    rewrite(tar, "000000004", json=b"{cut")
    report = convert(img2dataset, tmp_path / "in", tmp_path / "out")
    assert report["samples"] == {"train/captions": 2}
    assert report["left_out_items"]["00000.tar/000000001"] == "status failed_to_resize: image decoding error"
    assert report["reasons"] == {"missing image": 1, "status failed_to_resize": 1, "damaged image": 1, "json cannot be parsed": 1}


def test_missing_and_broken_statistics_are_said(tmp_path):
    shard(tmp_path / "in", 0, 1)
    shard(tmp_path / "in", 1, 1)
    (tmp_path / "in/00001_stats.json").write_text("[1")
    notes = convert(img2dataset, tmp_path / "in", tmp_path / "out")["notes"]
    assert sorted(notes) == ["tar with an unreadable _stats.json", "tar without _stats.json (its download may not be finished)"]


def test_images_may_be_generated_and_shrunk(tmp_path):
    shard(tmp_path / "in", 0, 1)
    convert(img2dataset, tmp_path / "in", tmp_path / "out", "--task", "text_to_image", "--image-size", 15)
    ((_, members),) = read_tar(tmp_path / "out/train/text_to_image-000000.tar")
    assert Image.open(io.BytesIO(members["target.png"])).size == (15, 10)


def test_a_stopped_conversion_keeps_its_finished_tars(tmp_path, monkeypatch):
    for number in range(3):
        shard(tmp_path / "in", number, 2)
    convert(img2dataset, tmp_path / "in", tmp_path / "whole")
    original, tars = img2dataset.convert_tar, []

    def interrupted(tar, *rest):
        tars.append(tar.name)
        for place, sample in enumerate(original(tar, *rest)):
            if len(tars) == 2 and place == 1:
                raise KeyboardInterrupt
            yield sample

    monkeypatch.setattr(img2dataset, "convert_tar", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(img2dataset, tmp_path / "in", tmp_path / "out")
    report = convert(img2dataset, tmp_path / "in", tmp_path / "out")
    assert tars == ["00000.tar", "00001.tar", "00001.tar", "00002.tar"]
    assert report == json.loads((tmp_path / "whole/report.json").read_text())
    assert same_files(tmp_path / "whole/train", tmp_path / "out/train") == 6
