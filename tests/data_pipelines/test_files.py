import io

import numpy as np
import pytest
from PIL import Image

from data_pipelines.converters.files import inside, stored_image
from data_pipelines.decoding import BadSampleError


def noise(kind: str, size: tuple[int, int] = (160, 90)) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp")])
def test_valid_images_are_kept_and_those_cut_in_their_data_refused(kind, suffix):
    content = noise(kind)
    assert stored_image(content) == (suffix, content)
    with pytest.raises(BadSampleError, match="cannot be decoded"):
        stored_image(content[: len(content) * 7 // 10])


def test_formats_without_a_suffix_of_their_own_become_png_without_loss():
    kind, content = stored_image(noise("PPM"))
    assert kind == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), np.asarray(Image.open(io.BytesIO(noise("PPM")))))


@pytest.mark.parametrize(
    ("size", "edge", "kind", "expected"),
    [(80, max, "png", (80, 45)), (144, max, "jpg", (144, 81)), (45, min, "png", (80, 45)), (160, max, "jpg", (160, 90))],
)
def test_the_edge_meant_is_shrunk_and_the_ratio_kept(size, edge, kind, expected):
    found, content = stored_image(noise("JPEG"), size, edge)
    assert (found, Image.open(io.BytesIO(content)).size) == (kind, expected)


def test_names_stay_inside_of_the_folder(tmp_path):
    assert inside(tmp_path, "a/b.jpg") == tmp_path / "a/b.jpg"
    assert inside(tmp_path, f"{tmp_path}/a.jpg") == tmp_path / "a.jpg"
    for name in ("../a.jpg", "a/../../b.jpg", "/etc/passwd", f"{tmp_path}/../a.jpg", "..\\a.jpg"):
        with pytest.raises(BadSampleError, match="outside of the folder"):
            inside(tmp_path, name)
    for name in ("", None, 7, "a\0.jpg"):
        with pytest.raises(BadSampleError, match="bad image name"):
            inside(tmp_path, name)
