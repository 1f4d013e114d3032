"""Rewrites experiment files of an earlier version: new names of classes, the map ``training``, ``callbacks.validation``.

    python tools/migrate_experiment.py FILE.yaml ...     rewrites in place, comments and order kept; says what was changed

A file that is of this version already stays as it is. Compare files are rewritten too (paths in vary, also and set). A run folder
or a checkpoint is not: train it again from the rewritten file.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import yaml

from umm_zoo.experiment.moved import KEYS, renamed

#: Nodes that arguments of UAE's stages went into.
_NODES = {
    "method.captions": "umm_zoo.methods.uae.captions.CaptionSampling",
    "method.rollouts": "umm_zoo.methods.uae.rollouts.Rollouts",
}
#: Arguments that got another name, those of nodes below the method too.
_RENAMED = {name: KEYS[f"method.{name}"].split(".")[-1] for name in ("picture_size", "draw_steps", "num_drawn_batches")}
_ATTENTION = re.compile(r"umm_zoo\.metrics\.Means, names: \[attention_bias, attention_log_bias\]")


def migrated(text: str, file: Path) -> str:
    """The text of an experiment or compare file as this version wants it.

    Raises:
        ValueError: the method is written in one line, so that its arguments cannot be moved.
    """
    text = _ATTENTION.sub("umm_zoo.metrics.AttentionBias", renamed(text))
    own, inherited = _targets(file)
    uae = ".uae." in (own or inherited)
    # UAE's captions have a length of their own, which stays with the method
    keys = KEYS | ({"method.max_new_tokens": "method.captions.max_new_tokens"} if uae else {})
    for old, new in keys.items():
        if new:
            text = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, text)
    blocks = _blocks(text.splitlines(keepends=True), 0)
    method = next((block for block in blocks if block.key == "method"), None)
    if method is None:
        return text
    head, arguments = method.inside()
    if head.rstrip().endswith("}"):
        raise ValueError(f"{file}: the method is written in one line; put its arguments on lines of their own")
    moved: dict[str, list[str]] = defaultdict(list)  # lines by the node that they went into; "" is not needed any more
    for block in arguments:
        node = keys.get(f"method.{block.key}", "method.").rpartition(".")[0]
        if node.startswith("method.") and not (uae and node in _NODES):
            node = "method"
        for old, new in _RENAMED.items():
            block.lines = [re.sub(rf"^(\s*){old}:", rf"\1{new}:", line) for line in block.lines]
        moved[node] += [f"  {line}" for line in block.lines] if "." in node else block.lines
    if moved["training"] and not any(block.key == "schedule" for block in arguments) and own and inherited and own != inherited:
        moved["training"].append("  schedule: null\n")  # a method of another class took nothing over from its base; a map does
    body = moved["method"]
    for node, target in _NODES.items():
        if lines := _without_blank_end(moved[node]):
            opening = [f"  {node.removeprefix('method.')}:\n", f"    _target_: {target}\n"]
            body = [*_without_blank_end(body), *opening, *lines, "\n"]
    out: list[str] = []
    for block in blocks:
        if block is not method:
            out += block.lines
            continue
        if any(line.strip() and not line.strip().startswith("#") for line in body):
            out += [*method.comments, head, *body]
        else:
            out += [*_without_blank_end(method.comments), *body]
        if moved["training"]:
            gap = [] if not out or out[-1].lstrip().startswith("#") else ["\n"]
            out = [*_without_blank_end(out), *gap, "training:\n", *_without_blank_end(moved["training"]), "\n"]
    if moved["callbacks.validation"]:
        out = _with_validation(out, moved["callbacks.validation"])
    return re.sub(r"\n{3,}", "\n\n", "".join(out))


class Block:
    """A key with its lines: the comments above it, itself, and what is indented below."""

    def __init__(self, key: str, comments: list[str], lines: list[str]) -> None:
        self.key, self.comments, self.lines = key, comments, [*comments, *lines]

    def inside(self) -> tuple[str, list[Block]]:
        """The line of the key, and the blocks below it."""
        own = self.lines[len(self.comments) :]
        body = own[1:]
        indents = [len(line) - len(line.lstrip()) for line in body if line.strip() and not line.lstrip().startswith("#")]
        return own[0], _blocks(body, indents[0] if indents else 2)


def _blocks(lines: list[str], indent: int) -> list[Block]:
    found: list[Block] = []
    waiting: list[str] = []
    for line in lines:
        key = re.match(rf"^ {{{indent}}}([\w.-]+):", line)
        if key:
            found.append(Block(key[1], waiting, [line]))
            waiting = []
        elif re.match(rf"^ {{0,{indent}}}#", line) or not line.strip():
            waiting.append(line)
        elif found:
            found[-1].lines += [*waiting, line]
            waiting = []
        else:
            waiting.append(line)
    return [*found, Block("", [], waiting)] if waiting else found


def _without_blank_end(lines: list[str]) -> list[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    return lines


def _with_validation(lines: list[str], settings: list[str]) -> list[str]:
    """The settings under ``callbacks.validation``."""
    node = ["  validation:\n", "    _target_: umm_zoo.callbacks.Validation\n", *_without_blank_end(settings)]
    for index, line in enumerate(lines):
        if line.rstrip() == "callbacks:":
            return [*lines[: index + 1], *node, *lines[index + 1 :]]
    for index, line in enumerate(lines):
        if re.match(r"^(metrics|trainer):", line):
            start = index
            while start and lines[start - 1].lstrip().startswith("#"):
                start -= 1
            return [*lines[:start], "callbacks:\n", *node, "\n", *lines[start:]]
    return [*_without_blank_end(lines), "\n", "callbacks:\n", *node]


def _targets(file: Path) -> tuple[str, str]:
    """Class of the method that a file states, and that its bases state; empty where it cannot be told."""
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return "", ""
    tree = tree if isinstance(tree, dict) else {}
    method, bases = tree.get("method"), tree.get("base") or []
    own = renamed(str(method.get("_target_", ""))) if isinstance(method, dict) else ""
    found = [_targets(file.parent / str(base)) for base in ([bases] if isinstance(bases, str) else bases)]
    return own, next((target for pair in reversed(found) for target in pair if target), "")


def main(argv: list[str] | None = None) -> int:
    """The command; 0 done, 2 where a file could not be rewritten."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    code = 0
    texts: dict[Path, str] = {}
    for file in parser.parse_args(argv).files:
        try:
            texts[file] = migrated(file.read_text(encoding="utf-8"), file)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
    for file, text in texts.items():  # after all were read: a child is understood through its base
        if text == file.read_text(encoding="utf-8"):
            print(f"{file}: as it was")
        else:
            file.write_text(text, encoding="utf-8")
            print(f"{file}: rewritten")
    return code


if __name__ == "__main__":
    sys.exit(main())
