"""Export of a finished run: one part, an adapter, or the whole method, each as a folder that the libraries load."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

import umm_zoo
from umm_zoo.backbones.adapters import LoRA, adapters_of
from umm_zoo.checkpoints.exported import OWN, REST, files_of, node_at
from umm_zoo.checkpoints.folder import CONTENTS
from umm_zoo.errors import UserError, locating, several
from umm_zoo.experiment.build import build
from umm_zoo.experiment.trust import trusting
from umm_zoo.method import Method
from umm_zoo.methods.uae.readers import CaptionReader
from umm_zoo.outputs import Draws
from umm_zoo.pretraining.judged import Judged
from umm_zoo.release.card import write_card
from umm_zoo.release.codec import write_codec
from umm_zoo.release.folder import new_folder
from umm_zoo.release.parts import (
    PARTS,
    LibraryPart,
    assert_same,
    assert_whole,
    cast,
    is_hub_name,
    is_of_run,
    library_parts,
    rest_of,
    shrink,
    whole_tree,
)
from umm_zoo.release.processors import write_processor
from umm_zoo.release.record import part_record, report_of, run_record, test_scores
from umm_zoo.release.script import SCRIPT, write_script
from umm_zoo.training.finished_run import FinishedRun, load_run

#: What the card says of an adapter.
MERGED = "The adapter of the run is merged into these weights."
ADAPTER = "An adapter alone, in peft's format: it means something beside its base model only."
BESIDE = "The run's adapter stands beside the weights that it was trained on, and the scores are of both together."


class Export:
    """Export of one run.

    Args:
        source: run folder or checkpoint.
        merge_adapter: add adapters to the weights that they stand beside.
        dtype: of the stored weights; None is as they were trained.
        raw_weights, trust: see ``load_run``.

    Raises:
        UserError: no finished run there, or one that cannot be exported so.
    """

    def __init__(
        self,
        source: str | Path,
        merge_adapter: bool = False,
        dtype: str | None = None,
        raw_weights: bool = False,
        trust: Sequence[str] = (),
    ) -> None:
        several("trust", trust)
        self.source, self.dtype, self.raw_weights, self.trust = Path(source), dtype, raw_weights, trust
        self.run: FinishedRun = load_run(source, (), trust, raw_weights)
        self.report = report_of(self.run, self.source)
        self.method: Method = self.run.load_method()
        self.node, self.adapter_nodes = whole_tree(self.run.experiment.method, self.run.experiment.adapters)
        self.places = {_part_name(name): name for name, module in self.method.named_modules() if isinstance(module, LoRA)}
        self.adapters: dict[str, Any] = {name: self.method.get_submodule(place) for name, place in self.places.items()}
        self.merged = False
        if merge_adapter:
            if not self.adapters:
                raise UserError("--merge-adapter", "a run without an adapter", "one with an adapter")
            self._merge()
        self.parts = library_parts(self.node, self.method)
        self.codec: nn.Module | None = None  # one of our own blocks, which no library loads
        if isinstance(self.method, Judged) and "codec" not in [part.folder for part in self.parts]:
            self.codec, self.codec_node = self.method.codec, self.node[self.method.codec_argument]
            inside = [replace(part, path=("codec", *part.path)) for part in library_parts(self.codec_node, self.codec)]
            self.parts = [*inside, *(part for part in self.parts if part.path[0] != "codec")]

    def _merge(self) -> None:
        """The method without its adapters, whose weights say the same."""
        for name, adapter in self.adapters.items():
            with locating(self.source, "--merge-adapter", (ValueError,)):
                adapter.merge()
            above, _, last = self.places[name].rpartition(".")
            owner: Any = self.method.get_submodule(above)
            if isinstance(owner, nn.ModuleDict):  # the adapters of a method
                del owner[last]
            else:
                node_at(self.node, above.split(".") if above else ()).pop(last)
                setattr(owner, last, None)
        self.adapters, self.adapter_nodes, self.merged = {}, {}, True

    def write(self, out: str | Path, part: str | None = None, test: bool = False, again: bool = False) -> dict[str, Any]:
        """Write ``out``, whole or not at all; returns its card.

        Args:
            out: a new folder.
            part: name of one part, or of an adapter; None is the whole method where it makes images, the adapter of a run that has
                one, else the part that others use.
            test: score the stored weights on the test split too.
            again: take the place of an earlier export.

        Raises:
            UserError: there is no such part, it has an adapter, or ``out`` is there already.
        """
        out = Path(out)
        name = part or (None if isinstance(self.method, Draws) else self._product())
        with new_folder(out, again) as folder:
            if name is None:
                card, stored = self._write_whole(folder, out)
            elif name == "codec" and self.codec is not None:
                card, stored = self._write_codec(folder, out)
            elif name in self.adapters:
                card, stored = self._write_adapter(folder, self.adapters[name], name, out)
            else:
                card, stored = self._write_part(folder, self._named(name), out)
            if self.merged:
                card["adapter"] = MERGED
            if test:
                card["scores"]["test"] = test_scores(self.run, self.source, stored, self.trust, self.raw_weights)
            write_card(folder, card)
        return card

    def _product(self) -> str:
        """What a run that makes no images is for."""
        if self.adapters:
            if len(self.adapters) > 1:
                hint = "--part NAME writes one, --merge-adapter none"
                raise UserError(self.source, f"{len(self.adapters)} adapters ({', '.join(self.adapters)})", "one", hint)
            return next(iter(self.adapters))
        if self.codec is not None:
            return "codec"
        own = [part.path[0] for part in self.parts if len(part.path) == 1]
        found = next((name for name in PARTS if name in own), None)
        if found is None:
            return self._named("").folder
        return found

    def _named(self, name: str) -> LibraryPart:
        for part in self.parts:
            if name in (part.folder, ".".join(part.path)):
                return part
        there = [*(part.folder for part in self.parts), *self.adapters, *(["codec"] if self.codec is not None else [])]
        raise UserError("--part" if name else self.source, f"'{name}'" if name else "no part to export", f"one of {there}")

    # -- the four forms ------------------------------------------------------------------------------------------------------

    def _card(self, name: str, node: Mapping[str, Any], parts: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
        libraries = {part["network"].partition(".")[0] for part in parts}
        return {
            "part": name,
            "class": str(node["_target_"]).removesuffix(".from_pretrained"),
            "load": dict(node),
            "library": libraries.pop() if len(libraries) == 1 else "diffusers",
            "parameters": sum(part["parameters"] for part in parts),
            "stored_as": self.dtype or "trained",
            "weights": self.run.weights,
            "weights_bytes": sum(path.stat().st_size for path in folder.rglob("*.safetensors")),
            "parts": parts,
            **run_record(self.run, self.source, self.report),
        }

    def _write_part(self, folder: Path, part: LibraryPart, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """One part, in its library's format at the root."""
        if beside := [name for name, adapter in self.adapters.items() if adapter.is_in(part.module)]:
            found = f"a part with an adapter beside it, without which its weights do not have the scores of {self.source.name}"
            raise UserError(f"--part {part.folder}", found, f"--merge-adapter, or --part {beside[0]}")
        self._save(part, folder)
        with trusting(self.run.experiment.named_modules):
            found_again = build(part.load_node(str(folder)))
        assert_same(found_again, part.module, self.dtype, f"{self.source}: {part.folder}")
        node = part.load_node(out.as_posix())
        stored = {f"{'.'.join(part.path)}.{key}": value for key, value in found_again.state_dict().items()}
        return self._card(out.name, node, [part_record(part, ".")], folder), stored

    def _write_adapter(self, folder: Path, adapter: LoRA, name: str, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """An adapter in peft's format at the root, and its base model in ``base`` unless that is untouched on the hub."""
        host = next((part for part in self.parts if adapter.is_in(part.module)), None)
        if host is None:
            raise UserError(f"--part {name}", "an adapter beside layers that no library's folder holds", "--merge-adapter")
        trained = any(key.startswith(f"{'.'.join(host.path)}.") for key in self.run.state)
        touched = trained or is_of_run(self.run.experiment.method, host.path)
        own = host.source
        base = own if own is not None and is_hub_name(own) and not touched else f"{out.as_posix()}/base"
        adapter.save(folder, host.network, base)
        shrink(folder, self.dtype)
        if base != host.source:
            (folder / "base").mkdir()
            with adapter.apart():
                self._save(host, folder / "base")
        node = {"_target_": "umm_zoo.backbones.adapters.LoRA", "rank": adapter.rank, "alpha": adapter.alpha}
        record = {**part_record(host, "base" if base != host.source else base), "made_from": host.source}
        card = self._card(out.name, node, [record], folder)
        return {**card, "library": "peft", "adapter": f"{ADAPTER} That is `{base}`."}, {}

    def _write_codec(self, folder: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """A codec of our own blocks, which ``load_codec`` of its method reads."""
        assert self.codec is not None and isinstance(self.method, Judged)
        said = {"weights": self.run.weights, "global_step": self.run.checkpoint.get("global_step"), "version": umm_zoo.__version__}
        parts = write_codec(self.codec, self.codec_node, folder, self._save, self.dtype, said)
        kind = type(self.method)
        again = kind.load_codec(folder, self.run.experiment.named_modules)
        assert_same(again, self.codec, self.dtype, str(self.source))
        node = {"_target_": f"{kind.__module__}.{kind.__qualname__}.load_codec", "source": out.as_posix()}
        card = self._card(out.name, node, [part_record(part, part.folder) for part in parts], folder)
        card["class"] = f"{type(self.codec).__module__}.{type(self.codec).__qualname__}"
        card["parameters"] = sum(p.numel() for p in self.codec.parameters())
        return card, {f"codec.{key}": value for key, value in again.state_dict().items()}

    def _write_whole(self, folder: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Every part in a folder of its own, the rest of the tensors, and a table of contents that ``Method.load`` reads."""
        reader = getattr(getattr(self.method, "renderer", None), "reader", None)
        if self.merged and isinstance(reader, CaptionReader) and not reader.with_adapter:
            found = f"a {type(reader).__name__}, which reads by the model without the adapter"
            raise UserError("--merge-adapter", found, "--part vlm beside it, or no merging")
        experiment = {key: value for key, value in self.run.checkpoint["experiment"].items() if key != "after"}
        experiment["method"] = self.node
        experiment["adapters"] = self.adapter_nodes
        own, training = self.method.all_parts(), dict(experiment.get("training") or {})
        training["trained"] = [name for name in training.get("trained", ()) if name in own]  # no adapter that is merged
        experiment["training"] = training
        rest = rest_of(self.method, self.parts)
        contents: dict[str, Any] = {"_class_name": type(self.method).__name__}
        with ExitStack() as stack:
            for adapter in self.adapters.values():
                stack.enter_context(adapter.apart())
            for part in self.parts:
                (folder / part.folder).mkdir()
                self._save(part, folder / part.folder)
                network = type(part.network)
                contents[part.folder] = [network.__module__.partition(".")[0], network.__name__]
        for name, adapter in self.adapters.items():
            host = next((part for part in self.parts if adapter.is_in(part.module)), None)
            adapter.save(folder / name, None if host is None else host.network, None if host is None else host.folder)
        for part in self.parts:
            above = node_at(self.node, part.path[:-1])
            above[part.path[-1]] = part.load_node(part.folder)
        assert_whole(self.node, self.parts)
        save_file(cast(rest, self.dtype), folder / REST, metadata={"format": "pt"})
        script = self.dtype is None and write_script(self.method, self.parts, folder)
        contents[OWN] = {
            "experiment": experiment,
            "parts": {".".join(part.path): part.folder for part in self.parts},
            "weights": self.run.weights,
            "global_step": self.run.checkpoint.get("global_step"),
            "version": umm_zoo.__version__,
            "adapters": adapters_of(self.method),
            "files": files_of(folder),
        }
        (folder / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
        with locating(self.source):
            again = Method.load(folder, self.run.experiment.named_modules)
        assert_same(again, self.method, self.dtype, str(self.source))
        node = {"_target_": "umm_zoo.method.Method.load", "source": out.as_posix()}
        card = self._card(out.name, node, [part_record(part, part.folder) for part in self.parts], folder)
        card |= {"class": f"{type(self.method).__module__}.{type(self.method).__qualname__}", "library": "diffusers"}
        card["parameters"] = sum(p.numel() for p in self.method.parameters())
        if self.adapters:
            card["adapter"] = BESIDE
        if script:
            card["script"] = SCRIPT
        return card, dict(again.state_dict()) if self.dtype else {}

    def _save(self, part: LibraryPart, folder: Path) -> None:
        with locating(self.source, part.folder, (ValueError,)):
            part.module.save(folder)
        shrink(folder, self.dtype)
        write_processor(part.module, folder)


def _part_name(place: str) -> str:
    """The part that an adapter is, by the module's name: ``adapters.decoder`` is ``decoder_adapter``."""
    above, _, last = f".{place}".rpartition(".adapters.")
    return f"{above}.{last}_adapter"[1:] if last != f".{place}" else place
