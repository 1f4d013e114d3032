"""The page: what is open, a tab for each ability, the history, trainings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from umm_zoo.play.ability_tab import ability_tab
from umm_zoo.play.asking import Cancelling
from umm_zoo.play.cards import ROOT
from umm_zoo.play.history_tab import history, history_tab
from umm_zoo.play.loaded import LoadedRun, labels, shared_abilities
from umm_zoo.play.training_tab import TrainingTab
from umm_zoo.report.html import Markup, element
from umm_zoo.training.run_folder import RunFolder

STATIC = Path(__file__).parent / "static"

#: Fonts of the reader's own machine: the theme's own would come from the network.
FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]


def heading(runs: Sequence[LoadedRun]) -> Markup:
    """Names, steps trained, and the way to the page of each run."""
    told = []
    for place, (run, label) in enumerate(zip(runs, labels(runs), strict=True)):
        link: list[str] = []
        if RunFolder(run.folder).experiment_file.is_file():
            link = [" ", element("a", "its page", href=f"{ROOT}/page/{place}", target="_blank", rel="noopener")]
        who = [element("b", label), ": "] if len(runs) > 1 else []
        told.append(element("div", *who, run.about(), *link, class_="run faint"))
    return element("div", element("h1", " and ".join(labels(runs)) or "umm_zoo"), *told, class_="heading")


def build(runs: Sequence[LoadedRun], training: bool, runs_at: str | None) -> tuple[gr.Blocks, dict[str, Any]]:
    """The page, and how it is dressed.

    Args:
        runs: none, one or two.
        training: whether trainings are offered.
        runs_at: folder of the run folders; None is the default.

    Raises:
        UserError: the runs have nothing in common.
    """
    names = shared_abilities(runs) if runs else []
    with gr.Blocks(title=" and ".join(labels(runs)) or "umm_zoo", analytics_enabled=False) as blocks:
        gr.HTML(heading(runs))
        cancelling = Cancelling()
        with gr.Tabs():
            for name in names:
                ability_tab(runs, name, cancelling)
            if runs:
                _, shown = history_tab(runs)
                blocks.load(lambda: history(runs), None, shown, show_progress="hidden", api_visibility="private")
            if training:
                TrainingTab(runs_at).opened(blocks)
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONO)
    script = f"<script>{(STATIC / 'play.js').read_text(encoding='utf-8')}</script>"
    return blocks, {"theme": theme, "css": (STATIC / "play.css").read_text(encoding="utf-8"), "head": script}
