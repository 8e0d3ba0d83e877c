"""What a person sees of a running estimate: how far it is, one line in words, a growing curve. No gradio here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from PIL import Image

from lib_estimate.costs import of_request
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.base import Host
from lib_estimate.interfaces.time_left import Pace, TimeLeft
from lib_estimate.job import Outcome, Progress
from lib_estimate.learn.plan import Goal
from lib_estimate.measuring import measured
from lib_estimate.progress import Cancel, Next, Note, Planned, StepReport
from lib_estimate.report.fidelity import Fidelity
from lib_estimate.report.in_words import LEFT_OUT
from lib_estimate.report.plots import live_curve
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.words import estimate

CURVE_EVERY = 1.0  # seconds
NETWORK = {  # what a stage looks at
    Goal.HIDDEN_STATES: "text encoder",
    Goal.CROSS_ATTENTION: "cross-attention",
    Goal.SKETCH: "sketch",
    Goal.NOISE: "U-Net",
    Goal.NOISE_AND_SKETCH: "U-Net",
}


@dataclass(frozen=True)
class View:
    """A moment of a run. `fraction` never falls; `curve` is None where nothing new is to be drawn."""

    fraction: float
    seconds_left: float | None
    words: str
    short: str  # of the words what fits into one line beside a bar
    notes: tuple[str, ...]
    curve: Image.Image | None
    outcome: Outcome | None


@dataclass
class Watcher:
    """Turns a job's progress into views."""

    request: EstimateRequest
    time: TimeLeft = field(default_factory=TimeLeft)
    notes: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    errors: list[tuple[int, float]] = field(default_factory=list)
    short: str = ""
    drawn: float = 0.0
    before: int = 0  # steps of earlier stages
    part: str = ""
    word: int = 1  # of several that a run makes
    words: int = 1

    def see(self, progress: Progress) -> View:
        words = ""
        if isinstance(progress, Planned):
            self.time.begin(progress)
        elif isinstance(progress, Next):
            self.word, self.words, words = progress.number, progress.total, progress.text
            self.short = words
        elif isinstance(progress, Note):
            self.notes.append(progress.text)
            words = progress.text
        elif isinstance(progress, StepReport):
            words = self._learning(progress)
        elif isinstance(progress, Outcome):
            self.time.fraction, words = 1.0, "Done."
            known[_like(self.request)] = self.time.pace
            self.short = words
        else:
            self.time.move(progress.name, progress.done / max(progress.total, 1))
            words = self.short = f"{progress.name}: {progress.done} of {progress.total}"
        outcome = progress if isinstance(progress, Outcome) else None
        left = None if outcome else self.time.left()
        return View(self.time.fraction, left, words, self.short, tuple(self.notes), self._curve(outcome), outcome)

    def _learning(self, report: StepReport) -> str:
        if report.part != self.part:
            self.before, self.part = (self.losses[-1][0] if self.losses else 0), report.part
            if self.errors:  # another part is judged by another measure
                self.errors.append((self.before, math.nan))
        at = self.before + report.step
        self.losses.append((at, report.loss))
        if report.error is not None and math.isfinite(report.error):
            self.errors.append((at, report.error))
        self.time.move(f"Learning ({report.part})", report.step / report.steps)
        self.short = f"Learning, {NETWORK[report.part]}: {report.step} of {report.steps}, error {report.best_error:.3f}"
        return (
            f"Learning ({report.part}): step {report.step} of {report.steps}, loss {report.loss:.4f}, "
            f"error {report.best_error:.4f} (it was {report.start_error:.4f} at the start)"
        )

    def _curve(self, outcome: Outcome | None) -> Image.Image | None:
        now = time.monotonic()
        if not self.losses or (outcome is None and now - self.drawn < CURVE_EVERY):
            return None
        self.drawn = now
        return live_curve(self.losses, self.errors, *self._left_out(outcome))

    def _left_out(self, outcome: Outcome | None) -> tuple[float | None, str]:
        """The error without what the prompt changes by, and what that is; None where the curve's errors are on another
        scale: learnt in sentences they are, and those of several words, each of which has its own."""
        in_sentences = self.request.use is Use.ANYWHERE and self.request.part in (Part.AUTO, Part.CROSS_ATTENTION)
        if outcome is None or in_sentences or self.words > 1:
            return None, ""
        return outcome.fidelity.unweighted_noise, LEFT_OUT.get(outcome.fidelity.reference, "")


known: dict[tuple[int, int], Pace] = {}  # of the last run at each size of the pictures, as long as the program lives


def _like(request: EstimateRequest) -> tuple[int, int]:
    return request.width, request.height


def takes(request: EstimateRequest) -> dict[Effort, str]:
    """What a request takes with each effort, in words: in time where a run at its size has been timed."""
    said, pace = {}, known.get(_like(request), Pace())
    for effort in Effort:
        costs = of_request(replace(request, effort=effort))
        seconds = pace.of(costs)
        pictures = sum(cost.forwards + cost.aside for cost in costs) / (2 * request.sampling_steps)
        said[effort] = f"about {pictures:.0f} pictures' worth" if seconds is None else f"about {duration(seconds)}"
    return said


def duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def views(request: EstimateRequest, host: Host, cancel: Cancel) -> Iterator[View]:
    """Runs an estimate and shows how it goes; the last view has the outcome. Raises what `words.estimate` raises."""
    watcher = Watcher(request)
    for progress in estimate(request, host, cancel):
        yield watcher.see(progress)


def measuring(embedding: Embedding, request: EstimateRequest, host: Host) -> Iterator[tuple[View, Fidelity | None]]:
    """Measures an embedding against a request's prompt and shows how it goes; the last view has the figures."""
    number, total, watcher, notes = 1, 1, Watcher(request), []
    for progress in measured(embedding, request, host):
        if isinstance(progress, Fidelity):
            yield View(1.0, None, "Measured.", "Measured.", tuple(notes), None, None), progress
            return
        if isinstance(progress, Next):
            number, total, watcher = progress.number, progress.total, Watcher(request)
        elif isinstance(progress, Note):
            notes.append(progress.text)
        view = watcher.see(progress)
        yield View((number - 1 + view.fraction) / total, None, view.words, view.short, tuple(notes), None, None), None
