"""``python -m umm_zoo.export RUN OUT``: a finished run as folders that transformers, diffusers and peft load, with a card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from umm_zoo.errors import REFUSALS, locating, say, user_errors
from umm_zoo.experiment.importing import importing
from umm_zoo.experiment.trust import trusting
from umm_zoo.training.finished_run import add_raw_weights, add_trust

HELP = """examples:
  python -m umm_zoo.export runs/shapes released/llava           a LLaVA: weights, tokenizer, processor, chat template, card
  python -m umm_zoo.export runs/photos/codec released/codec      the codec, as diffusers loads it
  python -m umm_zoo.export runs/wemmu/toy/stage4 released/wemmu  the whole bridge, which Method.load takes like a run
  python -m umm_zoo.export runs/wemmu/toy/stage4 released/decoder --part decoder
  python -m umm_zoo.export RUN released/adapter --part adapter   a LoRA, as peft loads it
  python -m umm_zoo.export RUN released/merged --merge-adapter   the weights with the adapter added to them

OUT is new, and there whole or not at all. A method that makes images is written whole: a folder per part of a library, every
other tensor in method.safetensors, and model_index.json. Of other runs it is what they train: an encoder, a codec, a
vision-language model, or the adapter. Weights are those that the scores are of: averages where the run keeps any, unless
--raw-weights."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.export",
        description="Write a finished run as folders of the libraries.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or one of its checkpoints (whose card states no scores)")
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument("--part", metavar="NAME", help="one part alone, or an adapter")
    parser.add_argument("--merge-adapter", action="store_true", help="add adapters to the weights that they stand beside")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the stored weights (default: as trained)")
    parser.add_argument("--test", action="store_true", help="score on the test split: the validation shards with /test/ for /val/")
    parser.add_argument("--again", action="store_true", help="take the place of an earlier export")
    add_trust(parser)
    add_raw_weights(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    given = parser.parse_args(argv)
    with user_errors(given.traceback) as outcome, locating(refusals=REFUSALS), trusting(given.trust):
        with importing():
            from umm_zoo.release.exporting import Export  # torch comes in here

        export = Export(given.run, given.merge_adapter, given.dtype, given.raw_weights, given.trust)
        card = export.write(given.out, given.part, given.test, given.again)
        say(f"{given.out}: {card['class'].rpartition('.')[2]}, {card['weights_bytes'] / 2**20:.2f} MiB, {card['weights']} weights")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())
