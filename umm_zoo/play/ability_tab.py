"""One ability of the runs on a page: what it is asked, its settings folded, what each run makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from umm_zoo.errors import UserError
from umm_zoo.generation import COMMANDS
from umm_zoo.generation.answering import PROMPT
from umm_zoo.play.asking import Asked, Cancelling
from umm_zoo.play.cards import error_card
from umm_zoo.play.loaded import LoadedRun, labels
from umm_zoo.play.watch import Cancelled
from umm_zoo.report.html import Markup, element

#: Names of the events of all abilities in one queue.
QUEUE = "generate"

#: What a text is called, by command.
_LABELS = {"ask": "Question", "caption": "Prompt", "text-to-image": "Prompt", "edit": "Instruction", "compose": "Instruction"}
_BUTTONS = {"ask": "Ask", "caption": "Describe"}
_CANCELLED = element("div", "cancelled", class_="faint")
_NAMES = {"num": "Number of images", "max_new_tokens": "Longest answer"}
_EXAMPLES = {
    "ask": "What colour is the circle?",
    "text-to-image": "top left: a small red circle",
    "edit": "Make the circle green.",
    "compose": "Put the star of the second image into the first.",
}


def _image() -> Any:
    """An image that is handed on as the file that came: what cannot be read is told by ``open_image``, in its own line."""
    image: Any = gr.Image(label="Image", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=300)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def ability_tab(runs: Sequence[LoadedRun], name: str, cancelling: Cancelling) -> gr.Tab:
    """The tab of a command."""
    command = COMMANDS[name]
    several = command.num_images[1] > 1
    options = {key: option for key, option in command.options_of(runs[0].model.method).items()}
    options = {key: option for key, option in options.items() if all(key in command.options_of(run.model.method) for run in runs)}
    images: Any = None
    text: Any = None
    with gr.Tab(name.replace("-", " ").capitalize(), id=name) as tab:
        gr.Markdown(command.help.partition(":")[0].capitalize() + ".", elem_classes="faint")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                if several:
                    images = gr.Gallery(
                        label="Images",
                        type="filepath",
                        interactive=True,
                        file_types=["image"],
                        columns=3,
                        height=240,
                        elem_id=f"{name}-images",
                    )
                elif command.num_images[1]:
                    images = _image()
                if command.asks:
                    value = PROMPT if command.line([], "x") != ["x"] else ""
                    text = gr.Textbox(label=_LABELS.get(name, "Text"), value=value, lines=2, placeholder=_EXAMPLES.get(name, ""))
                with gr.Row():
                    start = gr.Button(_BUTTONS.get(name, "Generate"), variant="primary")
                    stop = gr.Button("Cancel")
                status = gr.HTML(elem_classes="status", min_height=44)
                with gr.Accordion("Settings", open=False):
                    fields = {key: _field(runs, command, key) for key in options}
            with gr.Column(scale=3, min_width=300), gr.Row():
                outputs = []
                for label in labels(runs):
                    with gr.Column(min_width=280):
                        if len(runs) > 1:
                            gr.HTML(element("b", label))
                        outputs.append(gr.HTML())

        def generate(data: dict[Any, Any], request: gr.Request, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008
            given = {key: data[field] or "" for key, field in fields.items()}
            shown = data.get(images) if images is not None else None
            files = [
                item[0] if isinstance(item, tuple) else item for item in (shown if isinstance(shown, list) else [shown]) if item
            ]
            asked = Asked(name, files, (data.get(text) or "") if text is not None else "", given)
            cancelled = cancelling.begin(request.session_hash)

            def report(share: float | None, line: str) -> None:
                progress(share or 0.0, desc=line)

            cards: list[list[Markup]] = [[] for _ in runs]
            said: Markup = Markup("")
            try:
                for place, card in asked.results(runs, report, cancelled):
                    cards[place].append(card)
                    yield ["", *("".join(own) for own in cards)]
            except UserError as error:
                said = error_card(error.lines())
            except Cancelled:
                said = _CANCELLED
            yield [said, *("".join(own) for own in cards)]

        given_in = {part for part in (images, text, *fields.values()) if part is not None}
        asked_by = [start.click, *([text.submit] if text is not None else [])]
        begun = [
            event(
                generate,
                inputs=given_in,
                outputs=[status, *outputs],
                concurrency_limit=1,
                concurrency_id=QUEUE,
                show_progress_on=[status],
                api_visibility="private",
            )
            for event in asked_by
        ]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        stop.click(_ending(cancelling), outputs=[status], cancels=begun, **quiet)
    return tab


def _files(value: Any) -> list[str]:
    """The files of an image, of a gallery (with captions), or of neither."""
    found = value if isinstance(value, list) else [value]
    return [item[0] if isinstance(item, tuple) else item for item in found if item]


def _ending(cancelling: Cancelling) -> Callable[[gr.Request], Markup]:
    def end(request: gr.Request) -> Markup:
        cancelling.end(request.session_hash)
        return _CANCELLED

    return end


def _field(runs: Sequence[LoadedRun], command: Any, key: str) -> Any:
    """A setting: its words and limits are the option's, where nothing is typed the run's own counts."""
    option = command.options[key]
    own = [run.own(command, key) for run in runs]
    known = list(dict.fromkeys(str(value) for value in own if value is not None))
    info = f"{option.help}; {option.expected}"
    label = _NAMES.get(key, key.replace("_", " ").capitalize())
    if option.switch:
        return gr.Checkbox(label=label, info=option.help)
    return gr.Textbox(label=label, info=info, placeholder=" / ".join(known), max_lines=1)
