"""Report of paper-size parts on one GPU; see ``tools/gpu_report.sh``, which starts it.

Each part is a process of its own with seconds of its own, so that a slow one does not eat the rest; what it leaves goes to the
next. Then the open claims (``experiments/compare/*-large.yaml``) run in what time is left, and go on from there the next time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that one tool may use another, from any folder

#: Parts in their order, and the seconds that each may take of 480.
PLAN = {"limits": 25, "wemmu-stage1": 120, "metaquery": 80, "ross-lora": 60, "wemmu-stage2": 50}
PLAN |= {"janus": 40, "uae-rollout": 50, "ross-head": 30, "loading": 25}
CLAIMS = ("ross-large", "queries-large", "uae-large")
#: Dense bfloat16 products of an H200 (and H100) by its maker, in TFLOP/s.
PEAK = 989.0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: all parts, or with ``--part`` one of them, in this process."""
    given = parser().parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    os.chdir(ROOT)
    if given.part:
        run_part(given.part, given.out.resolve())
        return 0
    ends = time.monotonic() + 60 * given.minutes
    for name in given.parts or PLAN:
        left = ends - time.monotonic()
        share = PLAN[name] / sum(PLAN.values()) * 60 * given.minutes
        later = sum(PLAN[other] for other in list(PLAN)[list(PLAN).index(name) + 1 :]) / sum(PLAN.values()) * 60 * given.minutes
        seconds = left if given.parts else max(share, left - later)
        if seconds < 5:
            print(f"{name}: no time left")
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        finished = run(
            [sys.executable, __file__, "--out", str(given.out.resolve()), "--part", name], seconds, given.out / f"{name}.log"
        )
        print(f"{name}: {finished}", flush=True)
        (given.out / "report.md").write_text(page(given.out), encoding="utf-8")
    if not given.parts:
        claims(given.out, ends)
    print(page(given.out))
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder of the results")
    made.add_argument("--minutes", type=float, default=8.0, help="all together (default 8)")
    made.add_argument("--parts", nargs="+", choices=list(PLAN), help="these alone, each with all the time")
    made.add_argument("--part", choices=list(PLAN), help=argparse.SUPPRESS)
    return made


def run(command: list[str], seconds: float, log: Path) -> str:
    """Run a command for at most so long, with its output in a file; what became of it."""
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(max(1.0, seconds))
            return "done" if code == 0 else f"stopped with exit code {code}, see {log.name}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # its workers too
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            return "its time was up"


def run_part(name: str, out: Path) -> None:
    """All settings of a part that are not written yet."""
    import torch

    from tools.benchmarks import gpu_parts
    from tools.benchmarks.limits import limits
    from umm_zoo.training.report import circumstances

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    file = out / f"{name}.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"results": {}}
    where = circumstances()
    known |= {"device": torch.cuda.get_device_name() if device != "cpu" else "CPU, reduced depth", "commit": where["commit"]}
    known |= {"versions": where["versions"]}

    def done(setting: str) -> bool:
        return "seconds" in known["results"].get(setting, {})

    def tell(setting: str, numbers: Any) -> None:
        known["results"][setting] = numbers
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
        print(setting, numbers, flush=True)

    if name == "limits":
        for dtype, size in {"bfloat16": 8192, "float32": 4096}.items():
            size = size if device != "cpu" else 1024
            if not done(dtype):
                tell(dtype, {"seconds": 0.0, **limits(device, size, dtype=dtype)})
    elif name == "janus":
        gpu_parts.janus(device, done, tell)
    elif name == "loading":
        with tempfile.TemporaryDirectory() as folder:
            gpu_parts.loading(device, done, tell, Path(folder))
    else:
        gpu_parts.train(name, device, done, tell)


def claims(out: Path, ends: float) -> None:
    """The open claims, by the commands at the heads of their files, as far as the time goes."""
    import torch

    if not torch.cuda.is_available():
        print("open claims: left out, for there is no GPU")
        return
    for name in CLAIMS:
        if ends - time.monotonic() > 20:
            command = commands_of(name, out.resolve() / "claims")
            print(f"{name}: {run(['bash', '-ec', command], ends - time.monotonic(), out / f'{name}.log')}", flush=True)


def commands_of(name: str, out: Path) -> str:
    """The commands at the head of a comparison, with its results in a folder, its world made once."""
    text = (ROOT / "experiments/compare" / f"{name}.yaml").read_text(encoding="utf-8")
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#   ")]
    script = re.sub(r"\s{2,}\(.*?\)$", "", "\n".join(lines), flags=re.MULTILINE)
    script = re.sub(r"(umm_zoo\.compare \S+)", rf"\1 --out {out}", script)
    world, compare = re.sub(r"\bpython\b", sys.executable, script).rsplit("\n", 1)
    made = f"{out}/{name}.world"
    return f"mkdir -p {out}\nif [ ! -e {made} ]; then\n{world}\ntouch {made}\nfi\n{compare}\n"


def page(out: Path) -> str:
    """Everything found so far, as Markdown."""
    from umm_zoo.release.card import markdown_table

    found = {name: json.loads(file.read_text(encoding="utf-8")) for name in PLAN if (file := out / f"{name}.json").exists()}
    if not found:
        return "Nothing was measured.\n"
    first = next(iter(found.values()))
    lines = [f"# {first['device']}", "", f"Random weights; commit {first['commit']}, {first['versions']}."]
    if first["device"].startswith("CPU"):
        lines += [
            "",
            "**There is no GPU here: one or two layers a stack, two rows of small images, one step. It shows that all runs.**",
        ]
    machine = found.get("limits", {"results": {}})["results"]
    product = machine.get("bfloat16", {}).get("gflops", 0.0) / 1000
    lines += ["", f"Products: {product:.1f} TFLOP/s of {PEAK:.0f} by the maker; recomputed operations are counted.", ""]
    head = ["part", "setting", "s per step", "rows/s", "peak GiB", "TFLOP/s", "of the products here", f"of {PEAK:.0f}"]
    rows = []
    for name, own in found.items():
        for setting, numbers in own["results"].items():
            if name == "limits":
                continue
            if "seconds" not in numbers:
                rows.append([name, setting, numbers["failed"], *[""] * 5])
                continue
            twin = own["results"].get(f"paper{setting[setting.find(',') :]}", {})  # of a compiled one
            rate = numbers.get("gflop", twin.get("gflop", 0.0)) / numbers["seconds"] / 1000
            cells = [f"{numbers['seconds']:.3g}", f"{numbers['rows'] / numbers['seconds']:.3g}"]
            cells.append(f"{numbers['memory'] / 1024:.1f}" if "memory" in numbers else "")
            cells += [f"{rate:.3g}", f"{rate / product:.0%}" if product else "", f"{rate / PEAK:.0%}"] if rate else [""] * 3
            rows.append([name, setting, *cells])
    return "\n".join([*lines, *markdown_table(head, rows)]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
