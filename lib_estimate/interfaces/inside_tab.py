"""The tab's look into an embedding file: how long its vectors are, and which words of the model they are near."""

from __future__ import annotations

import html
import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gradio as gr

from lib_estimate.errors import EstimateError
from lib_estimate.files import names, reading
from lib_estimate.files.embedding import Embedding
from lib_estimate.interfaces.fields import identifier, in_the_tab
from lib_estimate.interfaces.shell import Shell
from lib_estimate.learn.continued import find_embedding, fitting_vectors
from lib_estimate.report.inside import Inside, Look, look_inside

log = logging.getLogger(__name__)
ABOUT = (
    "How long the vectors of an embedding are beside the words of the loaded model, and which words they are nearest "
    "to (cosine: 1 is the same direction)."
)
MEASURE = (
    "How close it comes to the prompt above, in pictures and figures; on other checkpoints, too, which are loaded one "
    "after the other."
)


class InsideTab:
    """A folded part of the tab: choose an embedding, see what is in it, or measure it. The tab runs the measuring."""

    def __init__(self, shell: Shell) -> None:
        self.shell = shell

    def lay_out(self) -> None:
        with gr.Accordion("An embedding you have", open=False, elem_id=identifier("inside")):
            gr.HTML(f"<p>{ABOUT}</p>", elem_id=identifier("inside_about"))
            with gr.Row():
                self.name = gr.Dropdown(
                    choices=self._names(), value=None, allow_custom_value=True, label="Embedding to look into",
                    elem_id=identifier("inside_name"),
                )  # fmt: skip
                self.name.do_not_save_to_config = True  # tomorrow there are other files in the folder
                self.again = gr.Button("Read the folder again", elem_id=identifier("inside_refresh"))
                self.show = gr.Button("Show", elem_id=identifier("inside_show"))
            gr.HTML(f"<p>{MEASURE}</p>", elem_id=identifier("inside_measure_about"))
            with gr.Row():
                self.checkpoints = gr.Dropdown(
                    choices=list(self.shell.checkpoints()), value=[], multiselect=True,
                    label="Checkpoints to measure on (none: as it is loaded now)", elem_id=identifier("checkpoints"),
                )  # fmt: skip
                self.checkpoints.do_not_save_to_config = True
                self.measure = gr.Button("Measure", elem_id=identifier("measure"))
            self.table = gr.HTML("", elem_id=identifier("inside_table"))
            self.footer = gr.HTML("", elem_id=identifier("inside_footer"))

    def connect(self, **in_turn: Any) -> None:
        """`in_turn`: what keeps the page's own queue from running this beside an estimate. A webui's has its lock."""
        self.again.click(
            lambda: [gr.update(choices=self._names()), gr.update(choices=list(self.shell.checkpoints()))],
            inputs=[], outputs=[self.name, self.checkpoints], queue=False, show_progress="hidden",
        )  # fmt: skip
        # A webui adds a text of its own to the last output.
        look = self.look if self.shell.live else self.shell.wrap(self.look, [gr.update()])
        self.show.click(look, inputs=[self.name], outputs=[self.table, self.footer], **in_turn)

    def _names(self) -> list[str]:
        return names.listed(Path(self.shell.embeddings_folder()))

    def look(self, name: str | None) -> list[str]:
        """What the table shows, and an empty footer. Whatever goes wrong becomes a sentence."""
        try:
            return [self._table(name), ""]
        except EstimateError as error:
            return [_said("bad", str(error)), ""]
        except Exception as error:  # the last place where it can become a sentence
            log.exception("The look into %s failed", name)
            return [_said("bad", f"Unexpected {type(error).__name__}: {error}"), ""]

    def chosen(self, name: str | None) -> Embedding:
        """The embedding of a name in the list; EstimateError where there is none."""
        if not name:
            raise EstimateError("Choose an embedding first. Those in the embeddings folder are in the list.")
        return reading.load(find_embedding(name, Path(self.shell.embeddings_folder())))

    def _table(self, name: str | None) -> str:
        embedding = self.chosen(name)
        alone = self.shell.turn("") if self.shell.live else nullcontext()  # a webui's is taken by `wrap` already
        with alone, self.shell.host().session() as session:
            looks = look_inside(fitting_vectors(embedding, session.info), session.words())
        return "".join(_look(key if len(looks) > 1 else "", look) for key, look in looks.items())


def _look(key: str, look: Look) -> str:
    title = f"{key}: " if key else ""
    low, high = look.usual
    head = (
        f"{title}{len(look.vectors)} vectors of width {look.width}. A typical word is {look.typical:.3g} long; of a "
        f"thousand words all but two are between {low:.3g} and {high:.3g} long."
    )
    columns = "".join(f"<th>{name}</th>" for name in ("vector", "length", "typical words", "nearest words"))
    rows = "".join(_row(number, v, look.typical) for number, v in enumerate(look.vectors, 1))
    warnings = "".join(_said("bad", warning) for warning in look.warnings())
    return f"{_said('words', head)}<table><tr>{columns}</tr>{rows}</table>{warnings}"


def _row(number: int, vector: Inside, typical: float) -> str:
    words = ", ".join(f"{html.escape(word)} <small>{cosine:.2f}</small>" for word, cosine in vector.words)
    cells = (number, f"{vector.length:.3g}", f"{vector.length / typical:.2f} x", words)
    kind = " class='bad'" if vector.far else ""
    return f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _said(kind: str, sentence: str) -> str:
    return f"<p class='{kind}'>{html.escape(in_the_tab(sentence))}</p>"
