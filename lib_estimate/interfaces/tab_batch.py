"""The tab's batch: a file dropped or styles of the webui ticked, made one after the other with the tab's settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lib_estimate.batch import Batch, Moment, Row
from lib_estimate.errors import RequestError
from lib_estimate.files import lists
from lib_estimate.hosts.base import Host
from lib_estimate.interfaces.fields import identifier
from lib_estimate.interfaces.view import View, Watcher
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest

HELP = (
    "Many prompts at once: a webui's styles.csv, a text file with a name, a tab and a prompt on each line, or JSON. "
    "Names and prompts come from there, everything else from the fields of this tab. What is there already stays."
)

Styles = Sequence[tuple[str, str, str]]


class BatchFields:
    """The components of the accordion, and what they list."""

    def __init__(self, styles: Callable[[], Styles], *, shown: bool) -> None:
        """shown: whether the program can have styles at all; it may have its first ones later."""
        self.styles, self.shown = styles, shown

    def lay_out(self) -> None:
        with gr.Accordion("Batch", open=False, elem_id=identifier("batch_fold")):
            gr.HTML(f"<p>{HELP}</p>", elem_id=identifier("batch_help"))
            self.file = gr.File(label="List of prompts", elem_id=identifier("batch_file"))
            names = [name for name, _, _ in self.styles()]
            self.ticked = gr.CheckboxGroup(
                choices=names, value=[], label="Styles", visible=self.shown, elem_id=identifier("batch_styles")
            )
            self.again = gr.Button("Read the styles again", visible=self.shown, elem_id=identifier("batch_again"))
            self.start = gr.Button("Estimate all", elem_id=identifier("batch_estimate"))
        self.again.click(self._again, inputs=[], outputs=[self.ticked], queue=False, show_progress="hidden")

    def _again(self) -> Any:
        return gr.update(choices=[name for name, _, _ in self.styles()], value=[])

    def lines(self, file: Any, ticked: Sequence[str] | None, common: EstimateRequest) -> lists.Listed:
        """What is dropped and what is ticked."""
        found, notes = [], []
        if file:
            path = Path(file if isinstance(file, (str, Path)) else file.name)  # Gradio 3 gives an open file
            found, notes = lists.read(path, common)
        known = {name: lists.Style(f'the style "{name}"', name, *texts) for name, *texts in self.styles()}
        chosen, more = lists.of_styles([known[name] for name in ticked or () if name in known], common)
        if not found and not chosen:
            raise RequestError("There is nothing to estimate. Drop a file, or tick styles.")
        return [*found, *chosen], [*notes, *more]


def watched(batch: Batch, host: Host, cancel: Cancel) -> Iterator[tuple[View, Moment]]:
    """Runs a batch; each moment comes with a view of the whole batch."""
    number = 0
    for moment in batch.run(host, cancel):
        if moment.number != number:
            number, watcher = moment.number, Watcher(moment.line.request)
        where = f"Line {number} of {moment.total} ({moment.line.request.name.strip()})"
        if isinstance(moment.progress, Row):
            words = f"{where}: {moment.progress.state}"
            yield View(number / moment.total, None, words, words, (), None, None), moment
        else:
            view = watcher.see(moment.progress)
            fraction = (number - 1 + view.fraction) / moment.total
            words, short = f"{where}: {view.words}", f"{number} of {moment.total}: {view.short}"
            yield View(fraction, None, words, short, (), view.curve, None), moment
