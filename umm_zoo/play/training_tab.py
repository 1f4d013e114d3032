"""A training chosen, checked, started and watched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from umm_zoo.errors import UserError
from umm_zoo.play.cards import ROOT, command, error_card, page_frame, training_card
from umm_zoo.play.following import follow, stop, trainings
from umm_zoo.play.launching import Plan, beside, checked, experiment_files, fields_of, launch, overrides_of, problems_of
from umm_zoo.report.html import Markup, element
from umm_zoo.training.run_folder import runs_folder

#: Fields that are offered first, where the file has them.
FIRST = ("name", "vars.data", "trainer.max_steps", "data.batch_size", "training.optimizer.lr")
ROWS = 10
SHOWN = 5
SECONDS = 3.0


@dataclass
class _Row:
    """One override: key, value, and what the checker says of it."""

    row: Any
    key: Any
    value: Any
    said: Any


class TrainingTab:
    """The tab.

    Args:
        runs: folder of the run folders, as ``--runs`` takes it; None is the default.
    """

    def __init__(self, runs: str | None) -> None:
        self.runs = runs
        with gr.Tab("Train", id="train") as self.tab, gr.Tabs() as self.inside:
            with gr.Tab("Watch", id="watch"):
                self._watch()
            with gr.Tab("Start", id="start"):
                self._start()
        self._wire()

    # -- starting ------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.file = gr.Dropdown(experiment_files(), label="Experiment file", value=None, filterable=True)
        gr.HTML(element("div", "Change what the file says; what the checker has to say stands beside it.", class_="faint"))
        self.rows = [self._row(number) for number in range(ROWS)]
        self.more = gr.Button("One more", size="sm")
        self.resume = gr.Checkbox(label="go on from the last checkpoint of its run folder (ckpt=last)")
        self.said = gr.HTML()
        self.line = gr.HTML()
        with gr.Row():
            self.check = gr.Button("Check (fit --check)")
            self.go = gr.Button("Start", variant="primary")
        self.report = gr.Textbox(label="fit --check", lines=12, max_lines=30, interactive=False, visible=False, elem_classes="mono")

    def _row(self, number: int) -> _Row:
        plain: dict[str, Any] = {"show_label": False, "container": False}
        with gr.Row(visible=number < SHOWN, equal_height=False) as row:
            key = gr.Dropdown([], label=f"field {number + 1}", allow_custom_value=True, scale=2, min_width=180, **plain)
            value = gr.Textbox(label=f"value {number + 1}", max_lines=1, scale=2, min_width=140, **plain)
            said = gr.HTML(min_height=1, scale=2)
        return _Row(row, key, value, said)

    def _plan(self, data: dict[Any, Any]) -> Plan:
        file = data[self.file]
        if file not in experiment_files():
            raise UserError("file", "none" if not file else f"'{file}'", "one of the list")
        given = overrides_of([data[row.key] for row in self.rows], [data[row.value] for row in self.rows])
        return Plan(file, given, self.runs, data[self.resume])

    def _values(self, file: str | None) -> dict[str, Any]:
        return fields_of(Plan(file)) if file in experiment_files() else {}

    def _chosen(self, file: str | None) -> list[Any]:
        """Fields of a file, and the first few of them in the rows."""
        values = self._values(file)
        first = [key for key in FIRST if key in values]
        updates: list[Any] = []
        for number in range(ROWS):
            key = first[number] if number < len(first) else None
            updates += [gr.Dropdown(choices=list(values), value=key), _value(values, key)]
        return updates

    def _line(self, data: dict[Any, Any]) -> Markup:
        """The command."""
        try:
            return command(self._plan(data).line)
        except UserError:
            return Markup("")

    def _looked_at(self, data: dict[Any, Any]) -> dict[Any, Any]:
        """What the checker says, beside the rows."""
        keys = [str(data[row.key] or "") for row in self.rows]
        try:
            plan = self._plan(data)
        except UserError:
            return {self.said: "", **{row.said: "" for row in self.rows}}
        own, rest = beside(problems_of(plan), [key if data[row.value] else "" for key, row in zip(keys, self.rows, strict=True)])
        found = {row.said: error_card([text]) if text else "" for row, text in zip(self.rows, own, strict=True)}
        return {**found, self.said: error_card(rest) if rest else ""}

    def _checked(self, data: dict[Any, Any]) -> dict[Any, Any]:
        try:
            return {self.report: gr.Textbox(value=checked(self._plan(data)), visible=True), self.said: ""}
        except UserError as error:
            return {self.said: error_card(error.lines())}

    def _launched(self, data: dict[Any, Any]) -> dict[Any, Any]:
        try:
            folder = launch(self._plan(data))
        except UserError as error:
            return {self.said: error_card(error.lines())}
        name = folder.relative_to(runs_folder(self.runs)).as_posix()
        return {self.said: "", self.which: self._choices(name), self.inside: gr.Tabs(selected="watch")}

    # -- watching ------------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with gr.Row():
            self.which = gr.Dropdown([], label="Training", value=None, scale=4)
            self.again = gr.Button("Look again", size="sm", scale=1)
        self.state = gr.HTML()
        with gr.Row():
            self.stop = gr.Button("Stop", variant="stop", visible=False)
            self.really = gr.Button("Stop it: it saves, and can go on later", variant="stop", visible=False)
            self.never_mind = gr.Button("Let it run", visible=False)
        self.frame = gr.HTML()
        self.seen = gr.State("")
        self.clock = gr.Timer(SECONDS)

    def _choices(self, name: str | None = None) -> Any:
        names = list(trainings(self.runs))
        return gr.Dropdown(choices=names, value=name if name in names else names[0] if names else None)

    def _folder(self, name: str | None) -> Path:
        found = trainings(self.runs)
        if name not in found:
            raise UserError("training", f"'{name}'", "one of the list")
        return found[name]

    def _followed(self, name: str | None, seen: str) -> dict[Any, Any]:
        """State and page; the page is loaded again only where it was written again."""
        try:
            training = follow(self._folder(name))
        except UserError:
            text = element("div", f"no run in {runs_folder(self.runs)} yet", class_="faint")
            return {self.state: text, self.frame: "", self.seen: "", self.stop: gr.Button(visible=False)}
        alive = training.ours and training.state in ("starting", "running")
        found: dict[Any, Any] = {self.state: training_card(training, str(name)), self.stop: gr.Button(visible=alive)}
        if not alive:
            found |= {self.really: gr.Button(visible=False), self.never_mind: gr.Button(visible=False)}
        now = f"{name} {training.page}"
        if now != seen:
            address = f"{ROOT}/training/{quote(str(name))}?{training.page}"
            none = element("div", "its page is written at the first validation", class_="faint")
            found |= {self.frame: page_frame(address) if training.page else none, self.seen: now}
        return found

    def _stopped(self, name: str | None) -> dict[Any, Any]:
        hidden = {self.really: gr.Button(visible=False), self.never_mind: gr.Button(visible=False)}
        try:
            stop(self._folder(name))
        except UserError as error:
            return {**hidden, self.state: error_card(error.lines())}
        return hidden

    # -- events --------------------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        pairs = [part for row in self.rows for part in (row.key, row.value)]
        asked, told = {self.file, self.resume, *pairs}, [self.said, *(row.said for row in self.rows)]
        self.file.change(self._chosen, self.file, pairs, **quiet).then(self._line, asked, self.line, **quiet).then(
            self._looked_at, asked, told, **quiet
        )
        for row in self.rows:
            row.key.input(lambda file, key: _value(self._values(file), key), [self.file, row.key], row.value, **quiet)
        for changed in (*(row.value for row in self.rows), self.resume):
            changed.change(self._line, asked, self.line, trigger_mode="multiple", concurrency_limit=1, **quiet)
            changed.change(self._looked_at, asked, told, trigger_mode="multiple", concurrency_limit=1, **quiet)
        count = gr.State(SHOWN)
        self.more.click(_one_more, count, [count, *(row.row for row in self.rows)], **quiet)
        self.check.click(self._checked, asked, [self.report, self.said], show_progress_on=[self.said], api_visibility="private")
        parts = [self.said, self.which, self.inside]
        self.go.click(self._launched, asked, parts, concurrency_limit=1, api_visibility="private")
        followed = [self.state, self.frame, self.seen, self.stop, self.really, self.never_mind]
        for event in (self.clock.tick, self.which.change):
            event(self._followed, [self.which, self.seen], followed, **quiet)
        self.again.click(self._choices, self.which, self.which, **quiet)
        both = [self.really, self.never_mind]
        self.stop.click(lambda: [gr.Button(visible=True)] * 2, None, both, **quiet)
        self.never_mind.click(lambda: [gr.Button(visible=False)] * 2, None, both, **quiet)
        self.really.click(self._stopped, self.which, [*both, self.state], **quiet)

    def opened(self, blocks: gr.Blocks) -> None:
        """What is shown when the page is opened, or loaded again: whatever the folders tell."""
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        blocks.load(lambda: [self._choices(), gr.Dropdown(choices=experiment_files())], None, [self.which, self.file], **quiet)


def _value(values: dict[str, Any], key: str | None) -> Any:
    """A box for a value, empty, that shows what the file says."""
    return gr.Textbox(value="", placeholder="" if key is None or key not in values else str(values[key])[:80])


def _one_more(count: int) -> list[Any]:
    count = min(ROWS, count + 1)
    return [count, *(gr.Row(visible=number < count) for number in range(ROWS))]
