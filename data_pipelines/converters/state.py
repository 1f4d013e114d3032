"""What a conversion remembers in its folder: the shards that are finished, so that a stopped one goes on, and parts share it.

``OUT/conversion.json`` has the arguments, a digest of the items, and each finished shard with what was left out of it. A process
that does part K of N writes a file of its own, ``conversion-K-of-N.json``, so that no two write the same one; who finds every shard
finished makes one of them all. Then the folder is what one process would have left.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipelines.command import Portion
from data_pipelines.converters.report import REPORT_FILE
from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.errors import UserError

STATE_FILE = "conversion.json"
_OF_PART = re.compile(r"conversion-\d+-of-\d+\.json")

#: What is remembered of each shard, by its place such as ``train/captions-000000``.
Shards = dict[str, dict[str, Any]]


class State:
    """State of the conversion in a folder, of which this process does a part.

    Args:
        head: what decides about the bytes written; a folder with a conversion of another one is refused.
        overwrite: forget and remove what is there.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, out: Path, head: dict[str, Any], part: Portion, overwrite: bool) -> None:
        self.out, self.head, self.part = out, head, part
        if out.exists() and not out.is_dir():
            raise UserError(out, "a file", "a folder to write into")
        if overwrite and part.count > 1:
            raise UserError(
                "--overwrite", f"together with --part {part}, whose shards other parts may have written already", "one of them"
            )
        others = [] if not out.is_dir() else [file for file in out.iterdir() if not file.name.startswith("conversion")]
        states = self._states()  # behind the others: another part may just begin
        if not states and not overwrite and any(file.name != REPORT_FILE for file in others):
            raise UserError(out, "this folder is not empty and holds no conversion; choose another one, or give --overwrite")
        if overwrite:
            self._forget(states)
        elif wrong := next(
            (name for former in states.values() if former["shards"] for name in head if self._differs(former, name)), None
        ):
            raise UserError(out, f"holds a conversion of other {wrong}; choose another folder, or give --overwrite")
        name = STATE_FILE if part.count == 1 else f"conversion-{part.number}-of-{part.count}.json"
        self.path, self._own = out / name, Shards()
        if not overwrite:  # who does all of it takes over what parts have done
            self._own = self.shards() if part.count == 1 else states.get(name, {"shards": {}})["shards"]
        self.record({})  # at once: what a run killed in its first shard leaves is ours
        if part.count == 1:
            self._remove_parts()

    def shards(self) -> Shards:
        """The shards of all parts."""
        return {place: entry for former in self._states().values() for place, entry in former["shards"].items()}

    def record(self, shards: Shards) -> None:
        """Remember shards that this process has written."""
        self._own |= shards
        write_json(self.path, {**self.head, "shards": self._own}, indent=1)

    def close(self, shards: Shards) -> None:
        """Make one file of those of all parts; none where there is nothing to go on with."""
        if shards:
            write_json(self.out / STATE_FILE, {**self.head, "shards": shards}, indent=1)
        else:
            (self.out / STATE_FILE).unlink(missing_ok=True)
        self._remove_parts()

    def _remove_parts(self) -> None:
        for name in self._part_names():
            (self.out / name).unlink(missing_ok=True)

    def _part_names(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("conversion-*.json") if _OF_PART.fullmatch(path.name))

    def _states(self) -> dict[str, dict[str, Any]]:
        """The files by name, that of the whole first, for those of parts are newer.

        It is read last: a part that closes writes it before it removes the others.
        """
        names = self._part_names()
        found = {name: content for name in [*names, STATE_FILE] if (content := self._read(self.out / name)) is not None}
        return {name: found[name] for name in (STATE_FILE, *names) if name in found}

    def _read(self, path: Path) -> dict[str, Any] | None:
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            dict(content["shards"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(path, f"cannot be read ({error}); choose another folder, or remove this one") from error
        return content

    def _differs(self, former: dict[str, Any], name: str) -> bool:
        return bool(former.get(name) != json.loads(json.dumps(self.head[name])))

    def _forget(self, states: dict[str, dict[str, Any]]) -> None:
        """Remove the files of a former conversion, and no others."""
        for place in (place for former in states.values() for place in former["shards"]):
            for suffix in (".tar", ".tar.index.json"):
                (self.out / f"{place}{suffix}").unlink(missing_ok=True)
        for name in (*states, REPORT_FILE):
            (self.out / name).unlink(missing_ok=True)
