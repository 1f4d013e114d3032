"""Draw what each image policy makes of one photograph, on one scale, with what is lost.

    python tools/show_policies.py                                 the image in data_pipelines/transforms, of a drawn scene
    python tools/show_policies.py --image photo.jpg --size 336    the same of an image of one's own

The drawn scene has a circle for distortion, a ruler for what is lost, and lines for the resolution that is left.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # from any folder

from data_pipelines.transforms.resize import PadToSquare, Resize, Square, Squeeze
from data_pipelines.transforms.shaped import Bucket, Native
from data_pipelines.transforms.tiles import Tiles
from umm_zoo.errors import locating, user_errors
from umm_zoo.generation.images import open_image

POLICIES = {
    "Square": Square(),
    "Squeeze": Squeeze(),
    "PadToSquare": PadToSquare(),
    "Bucket(64)": Bucket(64),
    "Native()": Native(),
    "Tiles()": Tiles(),
}
GAP, HEADER, PAPER = 12, 22, "white"


def scene(width: int = 1920, height: int = 1080) -> Image.Image:
    """A landscape with a ruler along its foot, a circle that shows distortion, lines that show resolution, and two marked ends."""
    image = Image.new("RGB", (width, height), (150, 196, 235))
    draw, unit = ImageDraw.Draw(image), width / 20
    draw.rectangle((0, height * 0.62, width, height), fill=(106, 160, 90))
    draw.polygon([(2 * unit, height * 0.62), (6 * unit, height * 0.22), (10 * unit, height * 0.62)], fill=(140, 132, 140))
    draw.ellipse((15.6 * unit, 0.6 * unit, 17.6 * unit, 2.6 * unit), fill=(250, 214, 80))
    draw.ellipse((8 * unit, 3 * unit, 12 * unit, 7 * unit), outline=(190, 40, 50), width=int(unit / 4))
    for number in range(16):  # the lines become finer to the right
        left = (12.8 + 3 * math.sqrt(number / 16)) * unit
        draw.rectangle((left, 4 * unit, left + (3.2 - 0.18 * number) * unit / 16, 6.6 * unit), fill=(50, 50, 60))
    draw.rectangle((0, 2.8 * unit, 0.8 * unit, 6.2 * unit), fill=(205, 60, 160))
    draw.rectangle((width - 0.8 * unit, 2.8 * unit, width, 6.2 * unit), fill=(40, 90, 200))
    font = ImageFont.load_default(unit * 0.7)
    for number in range(20):
        draw.rectangle((number * unit, height - unit, (number + 1) * unit, height), fill=("white", "black")[number % 2])
        if number % 2 == 0:
            draw.text(((number + 0.5) * unit, height - unit / 2), str(number), "black", font, "mm")
    return image


def panel(name: str, policy: Resize, image: Image.Image, size: int, shrink: float) -> Image.Image:
    """What a policy makes of an image, under its name, the sizes and what is lost: an overview, then tiles in their grid."""
    made = policy.images(image, size)
    columns, rows = policy.grid(*image.size, size) if isinstance(policy, Tiles) else (0, 0)
    edge = [max(1, round(side * shrink)) for side in made[0].size]
    step = [side + GAP // 3 for side in edge]
    parts = "" if len(made) == 1 else f"1 + {columns} x {rows} of "
    lost = policy.crop(*image.size, size).lost
    text = f"{name}: {parts}{made[0].width} x {made[0].height}" + (f", {lost:.0%} lost" if lost else "")
    font = ImageFont.load_default(13)
    width = max((columns + 1) * step[0], math.ceil(font.getlength(text)))
    drawn = Image.new("RGB", (width, max(rows, 1) * step[1] + HEADER), PAPER)
    ImageDraw.Draw(drawn).text((0, 2), text, "black", font)
    for number, part in enumerate(made):
        row, column = divmod(number - 1, columns) if number else (0, -1)
        drawn.paste(part.resize(edge, Image.Resampling.LANCZOS), ((column + 1) * step[0], row * step[1] + HEADER))
    return drawn


def sheet(image: Image.Image, size: int, shrink: float, width: int = 1000) -> Image.Image:
    """The image and a panel for each policy, in rows."""
    own = image.resize([max(1, round(side * size / max(image.size) * 1.5 * shrink)) for side in image.size])
    first = Image.new("RGB", (own.width, own.height + HEADER), PAPER)
    ImageDraw.Draw(first).text((0, 2), f"the image: {image.width} x {image.height}", "black", ImageFont.load_default(13))
    first.paste(own, (0, HEADER))
    rows: list[list[Image.Image]] = [[]]
    for one in [first, *(panel(name, policy, image, size, shrink) for name, policy in POLICIES.items())]:
        if rows[-1] and sum(other.width + GAP for other in rows[-1]) + one.width > width - 2 * GAP:
            rows.append([])
        rows[-1].append(one)
    heights = [max(one.height for one in row) + GAP for row in rows]
    drawn = Image.new("RGB", (width, sum(heights) + GAP), PAPER)
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for one in row:
            drawn.paste(one, (left, top))
            left += one.width + GAP
        top += height
    return drawn


def main(argv: list[str] | None = None) -> int:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, help="an image file; a drawn scene where none is given")
    parser.add_argument("--size", type=int, default=512, help="data.image_size")
    parser.add_argument("--out", type=Path, default=Path("data_pipelines/transforms/policies.png"))
    given = parser.parse_args(argv)
    with user_errors() as outcome:
        for policy in POLICIES.values():
            with locating(place="--size"):
                policy.check(given.size)
        image = scene() if given.image is None else open_image(given.image, "--image")
        drawn = sheet(image, given.size, 150 / given.size)
        with locating(given.out, refusals=(OSError, ValueError)):
            drawn.quantize(64).save(given.out, "PNG", optimize=True)
        print(given.out)
    return outcome.code


if __name__ == "__main__":
    raise SystemExit(main())
