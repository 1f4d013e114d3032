"""Write shards again with the latents of the pictures to be drawn beside them, so that training need not encode them each time.

    python tools/precompute_latents.py experiments/tiny/weights/codec 'data/draw/train/text_to_image-*.tar' data/draw-latents/train

Every sample gets ``KEY.latents.npy`` (float16, ``[C, h, w]``, normalised by the codec). Read them with
``task: {_target_: data_pipelines.tasks.TextToImage, extras: [latents]}``; methods that draw use them in place of the pictures.
The folder is a codec in diffusers' format (AutoencoderKL or AutoencoderDC, as its config says).
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipelines.write_shards import IndexedShardWriter
from umm_zoo.backbones.codecs import DCCodec, KLCodec, LatentCodec

CODECS: dict[str, type[KLCodec] | type[DCCodec]] = {"AutoencoderKL": KLCodec, "AutoencoderDC": DCCodec}


def load_codec(folder: str) -> LatentCodec:
    """The codec of a folder.

    Raises:
        ValueError: its config names no codec known here.
    """
    name = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")).get("_class_name")
    if name not in CODECS:
        raise ValueError(f"{folder}: holds a {name}, accepted are {', '.join(CODECS)}")
    return CODECS[name].from_pretrained(folder).eval()


def picture(data: bytes, size: int | None) -> Tensor:
    """``[3, H, W]`` in [-1, 1]."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def rewrite(codec: LatentCodec, shards: list[str], out: Path, size: int | None, batch_size: int, device: str) -> int:
    """Write every sample of ``shards`` with its latents; returns their number.

    Raises:
        ValueError: a sample has no picture to be drawn.
    """
    count = 0
    for path in map(Path, shards):
        name, number = path.stem.rsplit("-", 1)
        rows: list[dict[str, Any]] = [
            {key: value for key, value in row.items() if key == "__key__" or not key.startswith("__")}
            for row in wds.WebDataset([str(path)], shardshuffle=False)
        ]
        with IndexedShardWriter(out, name, max(1, len(rows)), first_shard=int(number)) as writer:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                for row in part:
                    if "target.png" not in row:
                        raise ValueError(f"{path}: sample {row['__key__']} has no target.png")
                pictures = torch.stack([picture(row["target.png"], size) for row in part]).to(device)
                with torch.no_grad():
                    latents = codec.encode(pictures).half().cpu().numpy()
                for row, latent in zip(part, latents, strict=True):
                    buffer = io.BytesIO()
                    np.save(buffer, latent)
                    writer.write({**row, "latents.npy": buffer.getvalue()})
        count += len(rows)
    return count


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", help="folder of the codec")
    parser.add_argument("shards", help="pattern of the shards, in quotes")
    parser.add_argument("out", type=Path, help="folder to write into; shards keep their names")
    parser.add_argument("--image-size", type=int, help="resize the pictures to this side before they are encoded")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per call of the codec")
    parser.add_argument("--device", default="cpu", help="cpu, cuda …")
    arguments = parser.parse_args()
    shards = sorted(glob.glob(arguments.shards))
    try:
        if not shards:
            raise ValueError(f"no shard at '{arguments.shards}'")
        codec = load_codec(arguments.codec).to(arguments.device)
        count = rewrite(codec, shards, arguments.out, arguments.image_size, arguments.batch_size, arguments.device)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"precompute_latents: {error}")
    print(f"{count} samples of {len(shards)} shards written to {arguments.out}")


if __name__ == "__main__":
    main()
