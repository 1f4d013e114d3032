"""``python -m data_pipelines.precompute EXPERIMENT [key=value …]``: writer of outputs of frozen parts beside the shards.

What a frozen part makes of a sample is the same in every epoch and every run: latents of a codec, targets of a reconstruction.
The method names what it can read back (``Method.precomputable``); training reads it wherever it was stored for exactly these
weights and this transform, and refuses it otherwise. The originals stay as they are. A stopped run goes on with the first
unfinished shard.

::

    python -m data_pipelines.precompute experiments/ross/toy/d-stage2.yaml
    python -m data_pipelines.precompute FILE data.image_size=384 --only latents --batch-size 32
    python -m data_pipelines.precompute FILE --part 3/8                  # one of eight jobs, in any order or at once

Stored beside each shard, in precomputed/NAME-HASH/, or below data.precomputed where that names a folder.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipelines.command import Parser, add_part, run, whole


def parser() -> Parser:
    """The command line."""
    made = Parser(__doc__)
    made.add_argument("experiment", metavar="EXPERIMENT", help="an experiment file")
    made.add_argument("overrides", nargs="*", metavar="key=value", help="as for umm_zoo.fit")
    made.add_argument("--only", action="append", metavar="NAME", help="store this output and no other (may be repeated)")
    made.add_argument("--batch-size", type=whole(1), default=64, metavar="N", help="samples computed together")
    made.add_argument("--half", action="store_true", help="store 16-bit floats: half the room, losses equal to about 1e-3")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument(
        "--measure", type=whole(0), default=6, metavar="N", help="training steps timed each way; 0 for none, as for a --part"
    )
    add_part(made)
    made.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = parser().parse_intermixed_args(argv)
    from data_pipelines.shards.storing import store_outputs  # torch comes with it, and --help does without

    return run(store_outputs, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
