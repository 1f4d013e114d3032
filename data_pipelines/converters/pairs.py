"""Pairs of image and text in tars that others made (``KEY.jpg``, ``KEY.txt``, sometimes ``KEY.json``)."""

from __future__ import annotations

import argparse
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.command import Parser
from data_pipelines.converters.converting import LeftOut, Made, Noted, Part, convert, converter_parser
from data_pipelines.converters.files import is_hidden, stored_image
from data_pipelines.converters.texts import notes, task_and_kind, without_markers, wording
from data_pipelines.decoding import BadSampleError, decode_json, decode_text, one_sample
from data_pipelines.shards.expanding import expand
from data_pipelines.tasks import IMAGE_TYPES, INSTRUCTION, question_and_answer
from umm_zoo.backbones.weight_files import stands_for
from umm_zoo.conversation import IMAGE_MARKER
from umm_zoo.errors import UserError, printable

#: What a pair becomes.
TASKS = ("text_to_image", "captions")
#: The caption is in the conversation already; the rest repeats the image's own header or the key.
_DROPPED = ("caption", "error_message", "exif", "key", "conversations", "task", "kind")
_MAX_CHARACTERS = 1_000_000
_MAX_MEMBER = 1 << 28
_TAR = re.compile(r"\.(tar(\.gz|\.bz2|\.xz)?|tgz|tbz2?|txz)$", re.IGNORECASE)
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t[gbx]z2?|tbz2|zip|7z|rar|zst|gz|bz2|xz|lz4)$", re.IGNORECASE)
_UNREADABLE = "tar cannot be read to its end"


def find_tars(source: Path) -> tuple[list[Path], dict[str, str]]:
    """The tars of a folder and its sub-folders, or what a glob or ``{000..015}`` range means, in sorted order; why not others.

    Tars may be compressed, as far as Python knows how (``.tar.gz``, ``.tgz``, ``.tar.bz2``, ``.tar.xz``).
    """
    if not source.is_dir():
        return [Path(path) for path in expand(str(source))], {}
    files = sorted(path for path in source.rglob("*") if path.is_file() and _ARCHIVE.search(path.name))
    refused: dict[str, str] = {}
    for path in files:
        if is_hidden(file := path.relative_to(source).as_posix()):
            refused[file] = "hidden file"
        elif not _TAR.search(path.name):
            refused[file] = f"an archive that is no tar, or of a compression that is not read: '{path.suffix}'"
    found = [path for path in files if path.relative_to(source).as_posix() not in refused]
    if not found:
        raise UserError(source, "no tar file in this folder", hint="; ".join(f"{file} is {why}" for file, why in refused.items()))
    return found, refused


def read_pairs(path: Path) -> Iterator[tuple[str, dict[str, bytes]] | LeftOut]:
    """Key and members of each pair, wherever they stand in the tar, and the members that belong to none.

    A key is a name up to its *last* dot, for names of files hold dots. Of a tar that is cut short, or none, all that is whole comes
    first, then a ``BadSampleError``.
    """
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    damage: BadSampleError | None = None
    with one_sample(_UNREADABLE):
        with path.open("rb") as file:
            if wrong := stands_for(head) if (head := file.read(512)) else "an empty file":
                raise BadSampleError(f"{_UNREADABLE}: {wrong}")
        tar = tarfile.open(path, "r:*")  # noqa: SIM115 - closed below
    with tar:
        try:
            with one_sample(_UNREADABLE):
                for member in tar:
                    if reason := _add(member, found):
                        yield LeftOut(f"{path.name}/{member.name}", reason)
                _check_end(tar)
        except BadSampleError as error:
            damage = error
        for key, members in found.items():
            try:
                with one_sample(_UNREADABLE):
                    contents = {kind: stream.read() for kind, member in members.items() if (stream := tar.extractfile(member))}
            except BadSampleError as error:
                yield LeftOut(f"{path.name}/{key}", str(error))
            else:
                yield key, contents
    if damage:
        raise damage


def _add(member: tarfile.TarInfo, found: dict[str, dict[str, tarfile.TarInfo]]) -> str:
    """Add a member to its pair; the reason where it belongs to none."""
    key, _, kind = member.name.removeprefix("./").rpartition(".")
    if member.isdir():
        return ""
    if is_hidden(member.name):
        return "hidden file"
    if not member.isreg() or member.issparse() or member.size > _MAX_MEMBER:
        return f"no plain file of up to {_MAX_MEMBER:,} bytes: {member.size:,} bytes of type {member.type!r}"
    if not key or key.endswith("/"):
        return "name without a suffix"
    if kind in found.setdefault(key, {}):
        return "member twice in the tar, of which the first counts"
    found[key][kind] = member
    return ""


def _check_end(tar: tarfile.TarFile) -> None:
    """A ``BadSampleError`` where the members do not end as an archive does: Python's tarfile takes damage for the end."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE:
        raise BadSampleError(f"{_UNREADABLE}: the archive is cut short")
    while end:
        if end.strip(b"\0"):
            raise BadSampleError(f"{_UNREADABLE}: damaged, or another archive, from byte {tar.offset:,} on")
        end = file.read(1 << 20)


def convert_tar(path: Path, number: int, task: str, size: int | None) -> Iterator[Made]:
    """The samples of one tar, and what is left out of it; ``number`` begins the keys, which tars of other downloads may repeat."""
    place = -1
    for found in read_pairs(path):
        if isinstance(found, LeftOut):
            yield found
            continue
        key, members = found
        place, origin = place + 1, printable(f"{path.name}/{key}")
        try:
            with one_sample("pair cannot be read"):
                sample, noted = _pair(members, place, task, size)
        except BadSampleError as error:
            yield LeftOut(origin, str(error))
            continue
        yield from noted
        sample["json"]["origin"] = origin
        yield {"__key__": f"{number:06d}-{place:08d}", **sample}


def pairs_parser(doc: str | None, task: str, needs_out: bool = True) -> Parser:
    """The command line of a converter of such tars; ``task`` is the default of what a pair becomes."""
    made = converter_parser(doc, "a folder of tars, one tar, a glob or a {000..015} range", needs_out=needs_out)
    made.add_argument("--task", choices=TASKS, default=task, help="whether the image is to be generated or described")
    return made


def convert_tars(
    arguments: argparse.Namespace,
    tars: list[Path],
    refused: Mapping[str, str],
    samples: Callable[[Path, int, str, int | None], Iterator[Made]] = convert_tar,
) -> None:
    """Convert tars one by one into ``OUT/train/TASK-000000.tar`` and so on, and report.

    ``samples`` gives those of a tar, ``refused`` are other archives.
    """
    part = Part(
        f"train/{arguments.task}",
        list(enumerate(tars)),
        lambda item: samples(item[1], item[0], arguments.task, arguments.image_size),
        lambda item: str(item[1]),
        items_per_shard=1,
        holds_rows=True,
    )
    convert(arguments, [part], refused)


def _pair(members: dict[str, bytes], number: int, task: str, size: int | None) -> tuple[dict[str, Any], list[Noted]]:
    used = {what: _only(members, kinds) for what, kinds in (("json", ("json",)), ("text", ("txt",)), ("image", IMAGE_TYPES))}
    meta = decode_json(members[used["json"]], _MAX_CHARACTERS, finite=False) if used["json"] else {}
    status = meta.pop("status", "success")
    if status != "success":
        raise BadSampleError(f"status {status}: {meta.get('error_message') or 'no message'}")
    text = decode_text(members[used["text"]], _MAX_CHARACTERS) if used["text"] else meta.get("caption")
    if text is None:
        raise BadSampleError("no text")
    text = wording(text, number)
    if not used["image"]:
        raise BadSampleError(f"missing image: found {', '.join(sorted(members))}")
    kind, content = stored_image(members[used["image"]], size)
    plain = without_markers(text)
    if not plain:
        raise BadSampleError(f"empty text: {text!r:.80}")
    noted = [Noted(f"{IMAGE_MARKER} removed from a text")] * (plain != text)
    noted += [Noted(f"member .{name} that is not converted") for name in members if name not in used.values()]
    is_caption = task == "captions"
    row = {**notes(meta, _DROPPED), **task_and_kind(meta, "caption" if is_caption else "text_to_image", task)}
    row["conversations"] = question_and_answer(INSTRUCTION, plain) if is_caption else [{"role": "user", "text": plain}]
    return {"json": row, f"{'0' if is_caption else 'target'}.{kind}": content}, noted


def _only(members: Mapping[str, bytes], kinds: Sequence[str]) -> str:
    """The only member of some types, empty where there is none; ``png`` or ``JPG`` beside ``jpg`` is another image."""
    found = [name for name in members if name.lower() in kinds]
    if len(found) > 1:
        raise BadSampleError(f"several files of one name: {', '.join(found)}")
    return found[0] if found else ""
