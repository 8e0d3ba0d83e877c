"""The tab's offer to go on with a run that was stopped when its program ended."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any, Protocol

import gradio as gr

from lib_estimate.errors import EstimateError, RequestError
from lib_estimate.interfaces.fields import identifier
from lib_estimate.learn.resume import Saved, drop, request_of, stopped_runs
from lib_estimate.request import EstimateRequest


class Program(Protocol):
    """What is needed of the program around it; see `interfaces.tab.Shell`."""

    def embeddings_folder(self) -> str: ...


class StoppedTab:
    """Shown only where there is such a run: which, how far it is, and whether to go on with it or drop it."""

    def __init__(self, shell: Program) -> None:
        self.shell = shell

    def lay_out(self) -> None:
        with gr.Column(visible=False, elem_id=identifier("stopped")) as self.box:
            self.said = gr.HTML("", elem_id=identifier("stopped_said"))
            with gr.Row():
                self.go_on = gr.Button("Go on", variant="primary", elem_id=identifier("stopped_go_on"))
                self.drop = gr.Button("Drop it", elem_id=identifier("stopped_drop"))
        self.name = gr.Textbox(visible=False, elem_id=identifier("stopped_name"))
        self.again = gr.Button(visible=False, elem_id=identifier("stopped_look"))

    @property
    def outputs(self) -> list[Any]:
        return [self.box, self.said, self.name]

    def connect(self, **script: str) -> None:
        """`script`: what the page runs when it presses the hidden button itself."""
        given = {"outputs": self.outputs, "queue": False, "show_progress": "hidden"}
        self.again.click(self.look, inputs=[], **given, **script)
        self.drop.click(self.dropped, inputs=[self.name], **given)

    def look(self) -> list[Any]:
        """What the outputs show now."""
        runs = stopped_runs(Path(self.shell.embeddings_folder()))
        if not runs:
            return [gr.update(visible=False), "", ""]
        return [gr.update(visible=True), _said(runs[0], len(runs) - 1), runs[0].name]

    def dropped(self, name: str) -> list[Any]:
        """Removes what the run has left, and looks for the next."""
        try:
            drop(Path(self.shell.embeddings_folder()), name)
        except EstimateError as error:  # it has just been begun somewhere else
            return [gr.update(visible=True), f"<p class='bad'>{html.escape(str(error))}</p>", ""]
        return self.look()

    def request(self, name: str) -> EstimateRequest:
        """What goes on with the run."""
        folder = self.shell.embeddings_folder()
        saved = next((run for run in stopped_runs(Path(folder)) if run.name == name), None)
        if saved is None:
            raise RequestError(f'There is no stopped run of "{name}" any more.')
        return request_of(saved, folder)


def _said(run: Saved, more: int) -> str:
    prompt = run.settings.get("negative" if run.settings.get("target") == "negative" else "prompt", "")
    others = f" {more} more such run{'s' if more > 1 else ''} can be gone on with after it." if more else ""
    said = f"A run was stopped at {html.escape(run.where)}: <b>{html.escape(run.name)}</b>"
    text = f"for the prompt <i>{html.escape(str(prompt))}</i>"
    return (
        f"<p class='note'>{said}, {text}. Going on gives the same embedding as if it had not been stopped.{others}</p>"
    )
