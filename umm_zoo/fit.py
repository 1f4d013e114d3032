"""``python -m umm_zoo.fit FILE [key=value …]``: train what an experiment file says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from umm_zoo.errors import UserError, user_errors
from umm_zoo.experiment.file import load_experiment
from umm_zoo.experiment.importing import importing
from umm_zoo.training.ranks import ending_together
from umm_zoo.training.run_folder import runs_folder

HELP = """examples:
  python -m umm_zoo.fit experiments/tiny/llava.yaml                          train; results in runs/<name>/
  python -m umm_zoo.fit FILE trainer.max_steps=200 training.optimizer.lr=3e-4  change what the file says
  python -m umm_zoo.fit FILE ckpt=last                                       continue where it stopped
  python -m umm_zoo.fit FILE --check                                         validate, count parameters, estimate memory

keys: name, seed, vars, method, training, data, callbacks, metrics, trainer, after; and ckpt=last or ckpt=PATH.
Overrides of vars, seed and of where a run takes place (trainer.accelerator, devices, num_nodes, strategy) also hold for the stages
that it comes after; all others are its own.
A run folder that holds this very experiment, finished, is left as it is. Ctrl-C and SIGTERM save and say where; a SLURM job that is
warned (sbatch --requeue --signal=USR1@120) saves, is requeued, and goes on by itself when the same command starts again."""


#: Begins the one pair that belongs to the command and not to the experiment.
CKPT = "ckpt="


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 2 a user error, 128 + the signal's number where one stopped it and it saved."""
    arguments = _parser().parse_intermixed_args(argv)
    with user_errors(arguments.traceback) as outcome, ending_together(runs_folder(arguments.runs), arguments.traceback):
        overrides = [text for text in arguments.overrides if not text.startswith(CKPT)]
        ckpt = next((text.removeprefix(CKPT) for text in reversed(arguments.overrides) if text.startswith(CKPT)), None)
        if ckpt == "":
            raise UserError("ckpt", "nothing", "'last' or the path of a checkpoint")
        experiment = load_experiment(arguments.file, overrides)
        if arguments.check:
            with importing():  # torch comes in here, after the errors of the file
                from umm_zoo.training.preview import print_check
            print_check(experiment, arguments.runs, ckpt)
        else:
            with importing():
                from umm_zoo.training.curriculum import run
            outcome.code = run(experiment, arguments.runs, ckpt, arguments.again)
    return outcome.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m umm_zoo.fit",
        description="Train what an experiment file says.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="last layer over the file; values are YAML")
    parser.add_argument("--check", action="store_true", help="validate, build on the meta device, report, and stop")
    parser.add_argument("--again", action="store_true", help="start over, removing what an earlier run wrote to the run folder")
    parser.add_argument("--runs", metavar="DIR", help="folder of the run folders (default: $UMM_ZOO_RUNS, else runs)")
    parser.add_argument("--traceback", action="store_true", help="show where an error line comes from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
