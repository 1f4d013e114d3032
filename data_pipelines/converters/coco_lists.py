"""Lists in COCO's layout, read row by row: files and captions of images by id, and which objects are in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipelines.converters.files import inside
from data_pipelines.converters.rows import Unusable, read_json
from data_pipelines.converters.texts import without_markers
from data_pipelines.decoding import BadSampleError, one_sample
from umm_zoo.errors import UserError

#: COCO's are numbers, those of lists of one's own also texts.
Id = int | str


def id_of(value: object) -> Id:
    """An id; 7, 7.0 and "7" are the same one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.isdecimal() and (value == "0" or value[0] != "0"):
        return int(value)
    if not isinstance(value, int | str) or isinstance(value, bool) or value == "":
        raise BadSampleError(f"no id: {value!r:.80}")
    return value


def in_order(image: Id) -> tuple[bool, Any]:
    """The key by which ids are sorted, numbers first."""
    return isinstance(image, str), image


class RowsOfList:
    """Rows of the lists of one file; those that cannot be used are ``refused``, each by its place and with its reason."""

    def __init__(self, path: Path, keys: tuple[str, ...], refused: dict[str, str]) -> None:
        self.name, self.refused = path.name, refused
        self.content = read_json(path, depth=2)
        for key in keys:
            if not isinstance(self.content, dict) or not isinstance(self.content.get(key), list):
                raise UserError(path, f"not COCO's layout, the list '{key}' is missing")

    def each(self, key: str, take: Callable[[dict[str, Any]], None]) -> None:
        """Give every row of a list to ``take``, which raises where it cannot use one."""
        for place, row in enumerate(self.content[key]):
            try:
                with one_sample("row cannot be read"):
                    if not isinstance(row, dict):
                        is_unusable = isinstance(row, Unusable)
                        raise BadSampleError(row.reason if is_unusable else f"row is no object: a {type(row).__name__}")
                    take(row)
            except BadSampleError as error:
                self.refused[f"{self.name}: {key} {place}"] = str(error)


@dataclass
class Objects:
    """Objects of one split: single ones per image and name, names per image of which there may be more, and every name.

    ``searched`` are the names that were looked for in vain in an image, where others were not looked for at all (LVIS);
    ``incomplete`` are images with a row that cannot be used, so that nobody knows what else is in them.
    """

    counts: dict[Id, Counter[str]] = field(default_factory=dict)
    crowds: dict[Id, set[str]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    searched: dict[Id, set[str]] = field(default_factory=dict)
    incomplete: set[Id] = field(default_factory=set)
    _frequency: Counter[str] = field(default_factory=Counter, repr=False)
    _together: dict[str, Counter[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, rows: RowsOfList) -> Objects:
        """Count the annotations of an instances file."""
        made, seen = cls(), set[Any]()
        categories: dict[Id, str | None] = {}

        def category(row: dict[str, Any]) -> None:
            number, name = id_of(row.get("id")), row.get("name")
            if not isinstance(name, str) or not name.strip():
                raise BadSampleError(f"no name: {name!r:.80}")
            name = name.strip().replace("_", " ")
            categories[number] = name if categories.get(number, name) == name else None

        def named(number: object) -> str:
            if name := categories.get(id_of(number)):
                return name
            raise BadSampleError(f"category without a name, or with several: {number!r:.80}")

        def image(row: dict[str, Any]) -> None:
            number = id_of(row.get("id"))
            made.counts.setdefault(number, Counter())
            made.incomplete.add(number)  # until the row has been understood
            if "neg_category_ids" in row:
                made.searched[number] = set(map(named, row["neg_category_ids"]))
            made.crowds[number] = set(map(named, row.get("not_exhaustive_category_ids") or ()))
            made.incomplete.discard(number)

        def annotation(row: dict[str, Any]) -> None:
            number = id_of(row.get("image_id"))
            counts = made.counts.setdefault(number, Counter())
            try:
                name = named(row.get("category_id"))
            except BadSampleError:
                made.incomplete.add(number)
                raise
            if "id" in row and (place := (number, name, repr(row["id"]))) in seen:
                raise BadSampleError("annotation twice in the list")
            seen.add(place if "id" in row else None)
            if row.get("iscrowd") not in (None, 0, "", "0", False):
                made.crowds.setdefault(number, set()).add(name)
            else:
                counts[name] += 1

        rows.each("categories", category)
        rows.each("images", image)
        rows.each("annotations", annotation)
        made.names = {name for name in categories.values() if name}
        for number in made.counts:
            present = made.present(number)
            made._frequency.update(present)
            for name in present:
                made._together.setdefault(name, Counter()).update(present - {name})
        return made

    def present(self, image: Id) -> set[str]:
        """Names of what is in an image, alone or in a crowd."""
        return set(self.counts[image]) | self.crowds.get(image, set())

    def absent(self, image: Id) -> list[str]:
        """Names of what is known not to be in an image, sorted."""
        return sorted(self.searched.get(image, self.names) - self.present(image))

    def popular(self, image: Id) -> list[str]:
        """Objects that are not in an image, most frequent in the split first."""
        return sorted(self.absent(image), key=lambda name: (-self._frequency[name], name))

    def adversarial(self, image: Id) -> list[str]:
        """Objects that are not in an image, most often together with what is there first."""
        score: Counter[str] = Counter()
        for name in self.present(image):
            score.update(self._together[name])
        return sorted(self.absent(image), key=lambda name: (-score[name], name))

    def countable(self, image: Id, most: int) -> Counter[str]:
        """Numbers from 1 to ``most`` of objects of which no crowd is marked."""
        crowds = self.crowds.get(image, set())
        return Counter({name: count for name, count in self.counts[image].items() if name not in crowds and count <= most})


@dataclass
class Split:
    """Split of the data: folders of its images, their file names by id, captions by id (None without a list), and its objects.

    ``ambiguous`` are ids of several files, ``refused`` rows of its lists that cannot be used; both with the reason.
    """

    name: str
    folders: list[Path] = field(default_factory=list)
    files: dict[Id, str] = field(default_factory=dict)
    captions: dict[Id, list[str]] | None = None
    objects: Objects | None = None
    ambiguous: dict[Id, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def read_files(self, rows: RowsOfList) -> None:
        """Take the file names of a list; an id that had another one before is ambiguous."""
        seen = set[Id]()

        def take(row: dict[str, Any]) -> None:
            image = id_of(row.get("id"))
            name = row.get("file_name") or row.get("coco_url")
            if not isinstance(name, str):
                raise BadSampleError("neither 'file_name' nor 'coco_url'")
            name = name.replace("\\", "/") if row.get("file_name") else "/".join(name.split("/")[-2:])  # LVIS has addresses alone
            if (other := self.files.setdefault(image, name)) != name:
                self.ambiguous[image] = f"id of several images: {image!r:.80} is {other} and {name}"
            elif image in seen:
                raise BadSampleError("image twice in the list")
            seen.add(image)

        rows.each("images", take)

    def read_captions(self, rows: RowsOfList) -> None:
        """Take the captions of a list."""
        captions = self.captions = {}

        def take(row: dict[str, Any]) -> None:
            if not isinstance(caption := row.get("caption"), str) or not (caption := without_markers(caption)):
                raise BadSampleError(f"no caption: {row.get('caption')!r:.80}")
            captions.setdefault(id_of(row.get("image_id")), []).append(caption)

        rows.each("annotations", take)

    def find(self, image: Id) -> tuple[Path, str]:
        """Folder of an image, and its name in there; names may begin with the split's folder."""
        if image in self.ambiguous:
            raise BadSampleError(self.ambiguous[image])
        if (name := self.files.get(image)) is None:
            raise BadSampleError(f"missing image: the list names no file of image {image!r:.80}")
        for folder in self.folders:
            for short in (name, name.removeprefix(f"{folder.name}/")):
                if inside(folder, short).is_file():
                    return folder, short
        return self.folders[0], name


def find_splits(source: Path, images: Path | None, wanted: list[str] | None) -> list[Split]:
    """The splits that are there, with their annotations."""
    if not source.is_dir():
        raise UserError(source, "no such folder")
    folder = source / "annotations" if (source / "annotations").is_dir() else source
    kinds = ("captions", "instances", "lvis")
    files = {path.stem: path for kind in kinds for path in sorted(folder.glob(f"{kind}_*.json"))}
    names = sorted({stem.split("_", 1)[1] for stem in files})
    if not names:
        raise UserError(folder, "neither captions_*.json nor instances_*.json", "one of them")
    for name in wanted or []:
        if name not in names:
            raise UserError("--splits", f"'{name}'", ", ".join(names))
    return [_read_split(images or source, images is not None, name, files) for name in wanted or names]


def _read_split(base: Path, is_named: bool, name: str, files: dict[str, Path]) -> Split:
    split = Split(name)
    if path := files.get(f"captions_{name}"):
        rows = RowsOfList(path, ("images", "annotations"), split.refused)
        split.read_files(rows)
        split.read_captions(rows)
    if path := files.get(f"instances_{name}") or files.get(f"lvis_{name}"):
        rows = RowsOfList(path, ("images", "annotations", "categories"), split.refused)
        split.read_files(rows)
        split.objects = Objects.of(rows)
    places = [base / name, base / "images" / name]
    has_folders = any(len(PurePosixPath(file).parts) > 1 for file in split.files.values())
    split.folders = [place for place in [*places, *([base] if is_named or has_folders else [])] if place.is_dir()]
    if not split.folders:
        raise UserError(places[0], f"no such folder of images (nor {places[1]})", hint="--images names another one")
    return split
