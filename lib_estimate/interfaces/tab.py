"""The tab, for whatever program it stands in: fields of the request on the left, what comes of them on the right.

One code for the Gradio of A1111 (3.41), of Forge (4.40) and today's: it keeps to what all of them have. What differs
is `JS`, the name of one keyword.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import gradio as gr

from lib_estimate.batch import Batch, summary
from lib_estimate.errors import EstimateError, ReportFailed
from lib_estimate.interfaces import markup
from lib_estimate.interfaces.bug_report import bug_report
from lib_estimate.interfaces.effort_tab import EffortTab
from lib_estimate.interfaces.fields import (
    COUNTS,
    LABELS,
    LEFT_OUT,
    PART_HELP,
    WORDS,
    component,
    field_of,
    identifier,
    request_from,
)
from lib_estimate.interfaces.inside_tab import InsideTab
from lib_estimate.interfaces.pictures import cards, gallery
from lib_estimate.interfaces.shell import Shell, taken_in
from lib_estimate.interfaces.stopped_tab import StoppedTab
from lib_estimate.interfaces.tab_batch import BatchFields, watched
from lib_estimate.interfaces.view import View, measuring, views
from lib_estimate.job import Outcome, cost_sentence
from lib_estimate.progress import Cancel, Interrupted
from lib_estimate.report.in_words import result_sentence
from lib_estimate.request import INIT_TEXT, EstimateRequest

log = logging.getLogger(__name__)
JS = "_js" if gr.__version__.startswith("3.") else "js"
OUT_OF_MEMORY = "Out of memory. Make the width and height of the generations learnt from, or the batch, smaller."
WAITING = "Waiting for the model: another run has it."
SWITCHED = (
    "The checkpoint was switched from {chosen} to {now} while this waited for its turn: it was done with the latter."
)
MOST_WAITING = 8  # presses of buttons in the tab without a webui
LEARNING = (
    "steps", "learning_rate", "optimizer", "loss", "schedule", "warmup", "seed", "ema", "patience", "start",
    "tolerance", "batch", "queries", "memory", "clip_gradient", "trajectories",
)  # fmt: skip
GENERATION = ("sampling_steps", "cfg_scale", "width", "height", "images")
COPY = """(name) => {
    if (!name) return;
    if (navigator.clipboard) { navigator.clipboard.writeText(name); return; }
    const field = document.createElement("textarea"); // on plain http there is no clipboard object
    field.value = name;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
}"""


def build(shell: Shell) -> gr.Blocks:
    """The tab."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        tab = Tab(shell)
        tab.lay_out()
        if shell.live:  # in a webui these are blocks among others, whose page our script watches
            blocks.load(tab.stopped.look, inputs=[], outputs=tab.stopped.outputs)
    return blocks


class Tab:
    """The components of one tab and what happens between them."""

    def __init__(self, shell: Shell) -> None:
        self.shell, self.inside, self.stopped = shell, InsideTab(shell), StoppedTab(shell)
        self.effort = EffortTab()
        self.fields: dict[str, Any] = {}
        self.cancel: Cancel | None = None  # of the run that goes on
        self.batch = BatchFields(shell.styles, shown=not shell.live)

    # ---- layout ----

    def lay_out(self) -> None:
        with gr.Row(elem_id=identifier("columns")):
            with gr.Column(scale=1):
                self._prompts()
                self._saving()
                self._buttons()
                self._method()
                self.batch.lay_out()
                self._folded("Learning", LEARNING)
                self._folded("Generations learnt from", GENERATION)
                self.inside.lay_out()
            with gr.Column(scale=1, elem_id=identifier("results")):
                self.stopped.lay_out()
                self._results()
        self._connect()

    def _field(self, name: str) -> Any:
        value = self.shell.start_values().get(name, field_of(name).default)
        self.fields[name] = component(name, value)
        # Else the webui's memory of fields would win over its settings page for good.
        self.fields[name].do_not_save_to_config = name in self.shell.start_values()
        return self.fields[name]

    def _prompts(self) -> None:
        self.counters, self.count = {}, {}
        for name, lines in (("prompt", 3), ("negative", 2)):
            self.fields[name] = gr.Textbox(
                label=LABELS.get(name, "Prompt"), lines=lines, elem_id=identifier(name),
                placeholder="(worst quality:1.4), blurry" if name == "negative" else "a (red:1.6) circle",
            )  # fmt: skip
            self.counters[name] = gr.HTML("", elem_id=identifier(f"{name}_tokens"))
            self.count[name] = gr.Button(visible=False, elem_id=identifier(f"{name}_count"))
        for field in ("target", "beside", "stages"):
            self._field(field)
        self._field("take_over_lora").visible = not self.shell.live  # without a webui there are none

    def _saving(self) -> None:
        with gr.Row():
            self._field("name")
            self._field("format")
        self._field("overwrite")

    def _buttons(self) -> None:
        with gr.Row():
            self.estimate = gr.Button("Estimate!", variant="primary", elem_id=identifier("estimate"))
            self.interrupt = gr.Button("Interrupt", elem_id=identifier("interrupt"))
            self.discard = gr.Button("Interrupt (not save)", elem_id=identifier("discard"))

    def _method(self) -> None:
        self._field("part")
        lines = "".join(f"<li><b>{WORDS[part.value]}</b>: {text}</li>" for part, text in PART_HELP.items())
        gr.HTML(f"<ul>{lines}</ul>", elem_id=identifier("parts"))
        self._field("effort")
        self.effort.lay_out()
        self._field("use")
        self._field("sentence")
        with gr.Row():
            self.fields["vectors"] = gr.Radio(
                choices=list(COUNTS.values()), value=COUNTS[INIT_TEXT], label=LABELS["vectors"],
                elem_id=identifier("vectors"), info="Auto: as few as keep the error below the tolerance",
            )  # fmt: skip
            self.fields["vector_count"] = gr.Number(
                value=8, precision=0, label="Number of vectors", elem_id=identifier("vector_count"),
            )  # fmt: skip
        with gr.Row():
            self._field("init")
            self._field("continue_from")

    def _folded(self, title: str, names: Sequence[str]) -> None:
        with gr.Accordion(title, open=False, elem_id=identifier(title.split()[0].lower())):
            for left, right in zip(names[::2], [*names[1::2], None], strict=False):
                with gr.Row():
                    self._field(left)
                    if right:
                        self._field(right)

    def _results(self) -> None:
        self.task = gr.Textbox(visible=False, elem_id=identifier("task"))
        self.progress = gr.HTML(markup.idle(), elem_id=identifier("progress"))
        with gr.Column(elem_id=identifier("preview")):
            self.curve = gr.Image(
                label="Loss and error", type="pil", interactive=False, height=320, elem_id=identifier("curve")
            )
        self.gallery = gr.Gallery(
            label="Each row from the same noise", elem_id=identifier("gallery"), columns=3,
        )  # fmt: skip
        self.result = gr.HTML("", elem_id=identifier("result"))
        self.done = gr.Textbox(visible=False, elem_id=identifier("saved_name"))
        with gr.Row(elem_id=identifier("send")):
            self.copy = gr.Button("Copy name", elem_id=identifier("copy"))
            self.send = {
                (tab, side): gr.Button(f"To {tab} {side}", elem_id=identifier(f"send_{tab}_{side}"))
                for tab in self.shell.send_buttons()
                for side in ("prompt", "negative")
            }
        self.footer = gr.HTML("", elem_id=identifier("footer"))
        self.restored = gr.Button(visible=False, elem_id=identifier("restore"))

    @property
    def outputs(self) -> list[Any]:
        """In the order of `_shown`. A webui adds its own text to the last."""
        return [self.progress, self.curve, self.gallery, self.result, self.done, self.effort.line, self.footer]

    # ---- events ----

    def _connect(self) -> None:
        inputs = [self.task, *self.fields.values()]
        of_batch = [self.task, self.batch.file, self.batch.ticked, *self.fields.values()]
        self._connect_run(self.estimate, self._run, inputs)
        self._connect_run(self.batch.start, self._run_batch, of_batch)
        of_measuring = [self.task, self.inside.name, self.inside.checkpoints, *self.fields.values()]
        self._connect_run(self.inside.measure, self._run_measuring, of_measuring)
        self._connect_run(self.stopped.go_on, self._run_stopped, [self.task, self.stopped.name])
        self.stopped.connect(**({} if self.shell.live else {JS: "embeddingEstimateLook"}))
        self.inside.connect(**self._alone)
        if not self.shell.live:
            self.restored.click(
                self._restore, inputs=[self.task], outputs=self.outputs, show_progress="hidden",
                **{JS: "embeddingEstimateRestore"},
            )  # fmt: skip
        for button, wanted in ((self.interrupt, "save"), (self.discard, "discard")):
            button.click(lambda wanted=wanted: self._stop(wanted), inputs=[], outputs=[], queue=False)
        for name in self.counters:
            self._connect_counter(name)
        self._connect_name()
        self.effort.connect(self.fields, self._request)

    @property
    def _alone(self) -> dict[str, Any]:
        """What lets several wait for the model, one of which has it, where the program has no queue of its own."""
        return {"concurrency_id": "model", "concurrency_limit": MOST_WAITING} if self.shell.live else {}

    def _connect_run(self, button: Any, run: Callable[..., Iterator[list[Any]]], inputs: list[Any]) -> None:
        """A press of the button runs `run` with a list of what stands in all inputs but the first, the task."""

        def live(task: str, *values: Any) -> Iterator[list[Any]]:
            yield self._shown(progress=markup.bar(0.0, None, WAITING))
            with self.shell.turn(task):
                yield from run(values)

        def in_turn(task: str, *values: Any) -> list[Any]:
            """Waits in the program's queue, which says so. The checkpoint may be switched meanwhile."""
            chosen = self.shell.checkpoint()

            def through(task: str, *values: Any) -> list[Any]:
                now, shown = self.shell.checkpoint(), []
                for shown in run(values):  # noqa: B007 (the last one counts)
                    pass
                return shown if now == chosen else self._noted(shown, SWITCHED.format(chosen=chosen, now=now))

            return self.shell.wrap(through, [gr.update()] * (len(self.outputs) - 1))(task, *values)

        if self.shell.live:
            end = button.click(live, inputs=inputs, outputs=self.outputs, show_progress="hidden", **self._alone)
        else:
            submit = {JS: "embeddingEstimateSubmit"}
            end = button.click(in_turn, inputs=inputs, outputs=self.outputs, show_progress="hidden", **submit)
        end.then(self.stopped.look, inputs=[], outputs=self.stopped.outputs, queue=False, show_progress="hidden")

    def _noted(self, shown: list[Any], note: str) -> list[Any]:
        """The outputs with a note under the result."""
        at = self.outputs.index(self.result)
        said = shown[at] if isinstance(shown[at], str) else ""
        return [*shown[:at], said + markup.noted([note]), *shown[at + 1 :]]

    def _connect_counter(self, name: str) -> None:
        """Gradio 3 drops a change that comes while the one before is still answered, and so the last word of whoever
        types quickly. There our script presses a button once typing has stopped.
        """
        for event in (self.fields[name].change, self.count[name].click):
            event(
                lambda text, steps: self._count(text, steps, name == "negative"),
                inputs=[self.fields[name], self.fields["sampling_steps"]], outputs=[self.counters[name]],
                queue=False, show_progress="hidden",
            )  # fmt: skip

    def _connect_name(self) -> None:
        self.copy.click(None, inputs=[self.done], outputs=[], **{JS: COPY})
        for (tab, side), button in self.send.items():
            send = f"(name) => {{ embeddingEstimateSend(name, '{tab}', {'true' if side == 'negative' else 'false'}); }}"
            button.click(None, inputs=[self.done], outputs=[], **{JS: send})

    def _count(self, text: str, steps: float, negative: bool) -> str:
        try:
            return f"<span>{html.escape(self.shell.count_tokens(text or '', int(steps or 1), negative))} tokens</span>"
        except EstimateError:  # while somebody is still typing
            return ""

    def _stop(self, wanted: str) -> None:
        """Stops the run that goes on; where none does, nothing is remembered."""
        cancel = self.cancel
        if cancel is not None:
            cancel.save() if wanted == "save" else cancel.discard()

    def _restore(self, task: str) -> Sequence[Any]:
        found = self.shell.restore(task) if task else None
        if found is not None and len(found) == len(self.outputs):
            return found
        # A webui that has forgotten the run gives outputs of its own tabs, which are fewer.
        return self._failed("The results of the run from before can't be shown any more; what it saved is there.")

    # ---- a run ----

    def _run(self, values: Sequence[Any]) -> Iterator[list[Any]]:
        """Runs an estimate; yields what to show."""
        yield from self._in_words(self._estimate_one, values)

    def _run_batch(self, values: Sequence[Any]) -> Iterator[list[Any]]:
        """Runs a batch of the file and the styles that come first among the values."""
        file, ticked, *others = values
        yield from self._in_words(self._estimate_all, file, ticked, others)

    def _run_measuring(self, values: Sequence[Any]) -> Iterator[list[Any]]:
        """Measures the embedding that comes first among the values, on the checkpoints that come second."""
        name, checkpoints, *others = values
        yield from self._in_words(self._measure, name, checkpoints, others)

    def _run_stopped(self, values: Sequence[Any]) -> Iterator[list[Any]]:
        """Goes on with the stopped run of a name."""
        try:
            request = self.stopped.request(values[0])
        except EstimateError as error:
            yield self._failed(str(error))
            return
        yield from self._in_words(self._estimated, request)

    def _in_words(self, work: Callable[..., Iterator[list[Any]]], *given: Any) -> Iterator[list[Any]]:
        """work(*given, cancel, begun), where whatever goes wrong becomes a sentence. `begun` is what takes the results
        of an older run away; `work` fills it in once there is a new one."""
        cancel = self.cancel = Cancel()
        begun: dict[str, Any] = {}
        try:
            yield from work(*given, cancel, begun)
        except EstimateError as error:
            log.info("Refused or stopped: %s", error)
            told = error if isinstance(error, ReportFailed) and not isinstance(error.__cause__, EstimateError) else None
            yield self._failed(str(error), told, given[-1], **begun)
        except MemoryError:
            yield self._failed(OUT_OF_MEMORY, **begun)
        except Exception as error:  # the last place where it can become a sentence
            log.exception("The estimate failed")
            if "out of memory" in str(error).lower():
                yield self._failed(OUT_OF_MEMORY, **begun)
            else:
                yield self._failed(f"Unexpected {type(error).__name__}: {error}", error, given[-1], **begun)
        finally:
            self.cancel = None

    def _request(self, values: Sequence[Any]) -> EstimateRequest:
        given = dict(zip(self.fields, values, strict=True))
        more = {name: self.shell.start_values().get(name, field_of(name).default) for name in LEFT_OUT}
        return request_from({**more, **given, "out": self.shell.embeddings_folder()})

    def _begin(self, begun: dict[str, Any]) -> list[Any]:
        begun |= {"curve": gr.update(value=None), "gallery": gr.update(value=None)}
        return self._shown(progress=markup.bar(0.0, None, "Starting"), result="", done="", **begun)

    def _estimate_one(self, values: Sequence[Any], cancel: Cancel, begun: dict[str, Any]) -> Iterator[list[Any]]:
        yield from self._estimated(self._request(values), cancel, begun)

    def _estimated(self, request: EstimateRequest, cancel: Cancel, begun: dict[str, Any]) -> Iterator[list[Any]]:
        request.validate()
        yield self._begin(begun)
        for view in views(request, self.shell.host(), cancel):
            self._show(view, cancel)
            if view.outcome is not None:
                yield self._finished(request, view)
            elif self.shell.live:
                yield self._shown(
                    progress=markup.bar(view.fraction, view.seconds_left, view.words), curve=view.curve,
                    result=markup.noted(view.notes),
                )  # fmt: skip

    def _show(self, view: View, cancel: Cancel) -> None:
        if self.shell.interrupted() and cancel.wanted is None:
            cancel.save()
        self.shell.show(view)

    def _estimate_all(
        self, file: Any, ticked: Sequence[str], values: Sequence[Any], cancel: Cancel, begun: dict[str, Any]
    ) -> Iterator[list[Any]]:
        """Runs a batch. The program hears of its files at the end: before, their names are plain words in prompts."""
        lines, notes = self.batch.lines(file, ticked, self._request(values))
        batch, made = Batch(lines), []
        yield self._begin(begun)
        try:
            for view, moment in watched(batch, self.shell.host(), cancel):
                self._show(view, cancel)
                if isinstance(moment.progress, Outcome):
                    made += [(moment.line.request, *file) for file in cards(moment.progress, moment.line.request)]
                if self.shell.live:
                    shown = markup.bar(view.fraction, None, view.words)
                    yield self._shown(progress=shown, curve=view.curve, result=markup.table(batch.rows))
        finally:
            notes = [*notes, *dict.fromkeys(note for new in made for note in taken_in(self.shell, *new))]
        done = markup.bar(1.0, None, summary(batch.rows))
        yield self._shown(progress=done, result=markup.table(batch.rows) + markup.noted(notes))

    def _measure(
        self, name: str, checkpoints: Sequence[str], values: Sequence[Any], cancel: Cancel, begun: dict[str, Any]
    ) -> Iterator[list[Any]]:
        request, embedding = self._request(values).validate(), self.inside.chosen(name)
        yield self._begin(begun)
        host = self.shell.on(checkpoints) if checkpoints else self.shell.host()
        for view, fidelity in measuring(embedding, request, host):
            self._show(view, cancel)
            if cancel.wanted is not None:
                raise Interrupted("Interrupted. Nothing was measured.")
            shown = {"progress": markup.bar(view.fraction, None, view.words), "result": markup.noted(view.notes)}
            if fidelity is not None:
                lines = [html.escape(line) for line in result_sentence(fidelity, embedding.name).splitlines()]
                shown |= {"result": markup.result(fidelity, lines, view.notes), "done": embedding.name}
                yield self._shown(gallery=gallery(fidelity, embedding.name), **shown)
            elif self.shell.live:
                yield self._shown(**shown)

    def _finished(self, request: EstimateRequest, view: View) -> list[Any]:
        outcome = view.outcome
        sentence = result_sentence(outcome.fidelity, outcome.title)
        files = cards(outcome, request)
        notes = [*view.notes, *dict.fromkeys(note for file in files for note in taken_in(self.shell, request, *file))]
        cost = cost_sentence(outcome.record["forwards"], request.sampling_steps, request.cfg_scale)
        lines = [*map(html.escape, [*sentence.splitlines(), cost])]
        lines += [f"Write <b>{html.escape(text)}</b> in your {side}." for side, text in outcome.written.items()]
        saved = ", ".join(map(str, (outcome.path, *outcome.others)))
        return self._shown(
            progress=markup.bar(1.0, None, f"Saved {saved}"), curve=view.curve,
            gallery=gallery(outcome.fidelity, outcome.title),
            result=markup.result(outcome.fidelity, lines, notes), done=next(iter(outcome.written.values())),
            takes=self.effort.said(request),
        )  # fmt: skip

    def _failed(
        self,
        sentence: str,
        unexpected: Exception | None = None,
        values: Sequence[Any] | EstimateRequest = (),
        **more: Any,
    ) -> list[Any]:
        """Shows the sentence; of an unexpected error, with the tab's values then or the request that they made, what to
        paste into a bug report."""
        said = markup.failed(sentence)
        if unexpected is not None:
            request = None
            with suppress(Exception):  # the values may be what is wrong
                request = values if isinstance(values, EstimateRequest) else self._request(values)
            said += markup.folded("To paste into a bug report", bug_report(unexpected, request, self.shell.about))
        return self._shown(progress=markup.idle(), result=said, done="", **more)

    def _shown(self, **changes: Any) -> list[Any]:
        """Outputs, in their order; what isn't named stays as it is. The footer is emptied: the webui adds to it."""
        names = ("progress", "curve", "gallery", "result", "done", "takes")
        return [gr.update() if changes.get(name) is None else changes[name] for name in names] + [""]
