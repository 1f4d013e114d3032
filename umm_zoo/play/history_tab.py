"""What was made before, newest first, with its settings and commands."""

from __future__ import annotations

from collections.abc import Sequence

import gradio as gr

from umm_zoo.play.cards import history_card
from umm_zoo.play.history import Entry
from umm_zoo.play.loaded import LoadedRun, labels
from umm_zoo.report.html import Markup, element

#: Entries that the page shows.
MOST = 60


def history(runs: Sequence[LoadedRun]) -> Markup:
    """Entries of all runs, read from their folders."""
    found = list[tuple[Entry, int]]()
    for place, run in enumerate(runs):
        if run.history.folder not in [other.history.folder for other in runs[:place]]:
            found += [(entry, place) for entry in run.history.entries(MOST)]
    newest = sorted(found, key=lambda pair: str(pair[0].row.get("time", "")), reverse=True)[:MOST]
    cards = []
    for entry, place in newest:
        maker = _place(entry.row.get("run"), place, runs)
        cards.append(history_card(entry, place, labels(runs)[maker], runs[maker].words))
    where = ", ".join(dict.fromkeys(str(run.history.folder) for run in runs))
    if not cards:
        return element("div", f"nothing yet; what is made is kept in {where}", class_="faint")
    return element("div", *cards, element("div", f"all of it lies in {where}", class_="faint"))


def _place(run: object, place: int, runs: Sequence[LoadedRun]) -> int:
    """The number of the run that made an entry, where several share a history."""
    return next((number for number, other in enumerate(runs) if other.words.run == run), place)


def history_tab(runs: Sequence[LoadedRun]) -> tuple[gr.Tab, gr.HTML]:
    """The tab, which is read again whenever it is opened."""
    with gr.Tab("History", id="history") as tab:
        shown = gr.HTML()
        again = gr.Button("Read again", size="sm")
    for event in (tab.select, again.click):
        event(lambda: history(runs), outputs=[shown], show_progress="hidden", api_visibility="private")
    return tab, shown
