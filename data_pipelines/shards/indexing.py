"""Index of byte offsets beside each tar: its form on disk, its place, and its making.

With the index a reader jumps to any sample of a plain tar file; that is what makes the order of samples a free choice. Whatever
is wrong with a shard (missing, empty, truncated, no tar) or with its index is a ``UserError`` that names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.shards.addresses import is_remote, shown
from data_pipelines.shards.hashing import content_of
from data_pipelines.shards.headers import BLOCK, members_of, open_tar
from data_pipelines.shards.measures import COLUMNS, digest, measures_of
from data_pipelines.shards.remote import RemoteError, State, fetch, read, state
from umm_zoo.checkpoints.plain_files import write_json
from umm_zoo.errors import UserError
from umm_zoo.experiment.reach import may_write_beside

INDEX_SUFFIX = ".index.json"
INDEX_VERSION = 3
#: Versions that are read. The former one has no measures.
READABLE = (2, INDEX_VERSION)
#: Damaged places that the head of an index names, and characters of each.
_LISTED, _LONGEST = 20, 200


class ShardUserError(UserError):
    """Error of a shard that cannot be used, or is not what its index says: data that is damaged, and not an experiment."""


def stale_index(path: str, where: str, found: str, expected: str = "") -> UserError:
    """The error of the index of ``path``: damaged, or of a tar that was replaced, cut short or is still being written."""
    return ShardUserError(shown(where), found, expected, f"`python -m data_pipelines.index {shown(path)}` makes a new index")


def index_tar(path: str | Path, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
    """The index of a plain tar file, whoever made it, from its headers and those of its images.

    The key of a member is its path up to the first dot of the file name, as in WebDataset (a leading ``./`` is dropped), and the
    rest in lower case is the extension. Samples stand in the order in which their first members do.

    Args:
        advance: told of the bytes that are done, in steps that add up to twice the size of the file.

    Returns:
        ``version``, ``tar_size``, ``sha256``, ``measured`` (the `digest` of its measures), ``counts`` (``samples``, ``members`` by
        extension, and what is damaged between them, ``damaged`` places of which ``damage`` has the first), ``duplicates``
        (``key.extension`` of members that came more than once; the first counts), ``skipped`` (names that belong to no sample:
        links, hidden files, names without extension; and what is damaged), ``refused`` (why, by the number of a sample that cannot
        be used) and columns instead of an object per sample: ``layouts`` (the lists of member names that occur), ``layout`` (each
        sample's, one number where all have the same), ``keys`` (the samples in order), ``offsets`` and ``sizes`` (of all members,
        sample after sample in the order of its layout), and those of `measures_of`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(path, "no such tar file")
    tar_size = path.stat().st_size
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    refused: dict[str, str] = {}
    duplicates: list[str] = []
    skipped: list[str] = []
    damage: list[str] = []
    try:
        with open(path, "rb") as file:
            file.seek(-min(BLOCK, tar_size), os.SEEK_END)
            is_whole = not file.read().strip(b"\0")
            file.seek(0)
            for member in members_of(open_tar(file, "r:", tar_size)):
                if isinstance(member, str):
                    damage.append(member[:_LONGEST])
                if isinstance(member, str) or not member.key:
                    skipped.append(member if isinstance(member, str) else member.name)
                    continue
                key, extension, place = member.key, member.extension, (member.header.offset_data, member.header.size)
                if member.header.is_beyond and not is_whole:
                    raise ShardUserError(path, f"cut short inside {member.name!r} ({tar_size} bytes)")
                if extension in samples.setdefault(key, {}):
                    duplicates.append(f"{key}.{extension}")
                    continue
                samples[key][extension] = place
                if member.refused:
                    refused.setdefault(key, member.refused)
            if not is_whole:
                raise ShardUserError(path, f"cut short between two members ({tar_size} bytes)")
    except tarfile.TarError as error:
        raise ShardUserError(path, f"not a plain (uncompressed) tar file: {error}") from error
    by_extension = Counter(extension for members in samples.values() for extension in members)
    layouts: dict[tuple[str, ...], int] = {}
    layout = [layouts.setdefault(tuple(members), len(layouts)) for members in samples.values()]
    places = [place for members in samples.values() for place in members.values()]
    measures = measures_of(path, samples, refused, advance)
    return {
        "version": INDEX_VERSION,
        "tar_size": tar_size,
        "sha256": content_of(path, advance),
        "measured": digest(measures),
        "counts": {
            "samples": len(samples),
            "members": dict(sorted(by_extension.items())),
            **({"damage": damage[:_LISTED], "damaged": len(damage)} if damage else {}),
        },
        "duplicates": duplicates,
        "skipped": skipped,
        "refused": {str(number): refused[key] for number, key in enumerate(samples) if key in refused} if refused else {},
        "layouts": [list(names) for names in layouts],
        "layout": 0 if len(layouts) == 1 else layout,
        "keys": list(samples),
        "offsets": [offset for offset, _ in places],
        "sizes": [size for _, size in places],
        **measures,
    }


def index_path(tar: str | Path) -> Path:
    """``NAME.tar.index.json`` beside a tar file."""
    return Path(f"{tar}{INDEX_SUFFIX}")


def read_index(place: str) -> dict[str, Any]:
    """The parsed file of an index, local or remote; whatever the parser raises where it is none."""
    text = read(place, 0, state(place).size).decode() if is_remote(place) else Path(place).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def shard_state(path: str) -> State:
    """Bytes of a shard, and of a remote one the version that the server names."""
    if is_remote(path):
        found = state(path)
    elif os.path.isfile(path):
        found = State(os.path.getsize(path), "")
    else:
        raise UserError(path, "no such shard")
    if found.size == 0:
        raise ShardUserError(shown(path), "this shard is an empty file (0 bytes); remove it or fetch it again")
    return found


def find_index(path: str, now: State, suits: Callable[[str], bool] = lambda place: True) -> str | None:
    """The place of an index that a shard has already and that ``suits``; ``now`` is the shard's state."""
    return next((place for place in _places(path, now) if _exists(place) and suits(place)), None)


def _places(path: str, now: State) -> list[str]:
    whole = f"{path}\n{now.tag}" if is_remote(path) else os.path.abspath(path)
    return [path + INDEX_SUFFIX, str(_in_cache(whole, INDEX_SUFFIX))]


def build_index(
    path: str,
    replace: bool = False,
    now: State | None = None,
    suits: Callable[[str], bool] = lambda place: True,
    advance: Callable[[int], None] | None = None,
) -> str:
    """The place of a shard's index, made where there is none that ``suits`` (or again with ``replace``); ``now`` is its state.

    It lies beside the shard, or in the user's cache where the shard's folder cannot or may not be written. One of a remote shard is
    of the version that the server names: another version is indexed again.
    """
    now = now or shard_state(path)
    if not replace and (there := find_index(path, now, suits)):
        return there
    places = _places(path, now)
    changed_at = 0 if is_remote(path) else os.stat(path).st_mtime_ns
    content = _index_remote(path, advance) if is_remote(path) else index_tar(path, advance)
    if content["tar_size"] != now.size:
        changed = f"from {now.size} to {content['tar_size']} bytes"
        raise UserError(shown(path), f"the shard changed {changed} while it was indexed; is it still written?")
    beside = may_write_beside() and not is_remote(path)
    for place in places if beside else places[1:]:
        try:
            write_index(place, content, changed_at)
            return place
        except OSError as error:
            reason = error
    raise UserError(shown(path), f"its index could not be written to {' or '.join(map(shown, places))}: {reason}")


def write_index(place: str | Path, content: dict[str, Any], changed_at: int) -> None:
    """Write an index with the time of its tar (nanoseconds; 0 for none), by which it is known to be of this tar."""
    write_json(place, content)
    if changed_at:
        os.utime(place, ns=(changed_at, changed_at))


def check_content(path: str, place: str, sha256: str) -> None:
    """Compare the content of a local tar with that of its index, where their times differ; once, for the time is then set.

    Raises:
        UserError: it is another content.
    """
    changed_at = os.stat(path).st_mtime_ns
    if os.stat(place).st_mtime_ns == changed_at:
        return
    verified, known = _in_cache(os.path.abspath(path), ".verified"), f"{changed_at} {sha256}"
    with suppress(OSError):
        if verified.read_text(encoding="utf-8") == known:
            return
    if content_of(path) != sha256:
        raise stale_index(path, path, f"its content is not what its index was made for (sha256 {sha256})")
    with suppress(OSError):
        if may_write_beside():
            os.utime(place, ns=(changed_at, changed_at))
        if os.stat(place).st_mtime_ns == changed_at:
            return
    with suppress(OSError):  # a folder of others, or a file system with coarser times
        verified.parent.mkdir(parents=True, exist_ok=True)
        verified.write_text(known, encoding="utf-8")


def verify_index(path: str, place: str, sha256: str) -> None:
    """Compare a shard with its index, whatever their times: the content, and the place of each member.

    Raises:
        UserError: they differ.
    """
    content = _index_remote(path) if is_remote(path) else index_tar(path)
    if content["sha256"] != sha256:
        hint = f"fetch it again, or `python -m data_pipelines.index {shown(path)}` where the new content is meant"
        expected = f"{sha256[:16]}…, for which its index was made"
        raise UserError(shown(path), f"sha256 {content['sha256'][:16]}…", expected, hint)
    stated = read_index(place)
    for name in ("keys", "layouts", "layout", "offsets", "sizes", *(["measured", *COLUMNS] if "measured" in stated else ())):
        if stated[name] != content[name]:
            raise stale_index(path, place, f"its {name} are not those of the tar")


def _in_cache(name: str, suffix: str) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "umm_zoo" / "indexes"
    return base / (hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:32] + suffix)


def checked_index(path: str, place: str) -> dict[str, Any]:
    """The content of the index at ``place``; a user error where it is none, or of another version."""
    try:
        content = read_index(place)
        if content["version"] == INDEX_VERSION and isinstance(content["counts"]["samples"], int):
            return content
        found = f"index version {content['version']!r}"
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes the parser raise
        found = f"this index cannot be read ({type(error).__name__}: {str(error)[:120]})"
    raise stale_index(path, place, found)


def _index_remote(path: str, advance: Callable[[int], None] | None = None) -> dict[str, Any]:
    """Index a remote shard by fetching it once; afterwards only the members needed are read."""
    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "shard.tar")
        fetch(path, local)
        return index_tar(local, advance)


def _exists(place: str) -> bool:
    if not is_remote(place):
        return os.path.isfile(place)
    try:
        state(place)
    except RemoteError as error:
        if error.missing:
            return False
        raise
    return True
