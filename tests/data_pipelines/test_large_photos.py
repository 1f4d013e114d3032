"""Large photographs: the decoder of JPEG shrinks them on the way, and what comes of it is a whole decoding within a tolerance.

The tolerance, in levels of 255: a mean of 2 and, at 99 of 100 pixels, 12.
"""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from data_pipelines.decoding import decode_images
from data_pipelines.transforms.resize import SHRUNK, PadToSquare, Square, Squeeze, scaled
from data_pipelines.transforms.shaped import Bucket, Native
from data_pipelines.transforms.tiles import Tiles

POLICIES = [Square(), Squeeze(), PadToSquare(), Bucket(16), Native(), Tiles()]
KINDS = ["baseline", "progressive", "grey", "cmyk", "rotated"]


def photograph(width: int, height: int) -> Image.Image:
    """Gradients, some texture, and hard edges."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse) + rng.normal(0, 5, (height, width, 1))
    pixels[height // 3 : height // 2, width // 5 : width // 2] = (230, 40, 60)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


WHOLE = photograph(1216, 912)


def jpeg(kind: str) -> bytes:
    image, options = WHOLE, {"quality": 92, "progressive": kind == "progressive"}
    if kind in ("grey", "cmyk"):
        image = image.convert({"grey": "L", "cmyk": "CMYK"}[kind])
    if kind == "rotated":
        options["exif"] = exif = Image.Exif()
        exif[274] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def files():
    return {kind: jpeg(kind) for kind in KINDS}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_a_shrunk_photograph_is_the_whole_one_within_the_tolerance(files, policy, monkeypatch):
    for kind in KINDS:
        drafts, draft = [], JpegImageFile.draft
        monkeypatch.setattr(JpegImageFile, "draft", lambda own, *size, found=drafts, do=draft: found.append(do(own, *size)))
        quick = decode_images(files[kind], 128, policy).images
        monkeypatch.setattr(JpegImageFile, "draft", lambda own, *size: None)
        whole = decode_images(files[kind], 128, policy).images
        monkeypatch.undo()
        assert drafts[0] is not None, kind  # the decoder did shrink it
        apart = [np.abs(one.astype(int) - other) for one, other in zip(quick, whole, strict=True)]
        assert max(own.mean() for own in apart) < 2 and max(np.percentile(own, 99) for own in apart) <= 12, kind


def test_what_was_shrunk_is_resized_as_pil_does_within_two_levels():
    half = WHOLE.reduce(2)
    noted = half.copy()
    noted.info[SHRUNK] = True
    for resample, box in ((Image.Resampling.BICUBIC, None), (Image.Resampling.BILINEAR, (3, 7, 501, 455))):
        expected, found = (np.asarray(scaled(own, (200, 150), resample, box)).astype(int) for own in (half, noted))
        assert np.abs(expected - found).max() <= 2
    lanczos = [scaled(own, (50, 40), Image.Resampling.LANCZOS).tobytes() for own in (half, noted)]
    assert lanczos[0] == lanczos[1]


@pytest.mark.parametrize("size", [(300, 200), (301, 200)])
def test_a_photograph_that_is_not_shrunk_stays_pils_to_the_bit(size):
    image, file = WHOLE.resize(size), io.BytesIO()
    image.save(file, "JPEG", quality=92)
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        expected = np.asarray(ImageOps.fit(opened, (128, 128), Image.Resampling.BICUBIC))
    assert (decode_images(file.getvalue(), 128, Square()).images[0] == expected).all()


def test_a_cut_between_pixels_is_left_to_pil():
    image = WHOLE.resize((301, 200))
    noted = image.copy()
    noted.info[SHRUNK] = True
    assert Square().fit(noted, (128, 128)).tobytes() == Square().fit(image, (128, 128)).tobytes()
