"""What a person sees of a running estimate: how far it is, one line in words, a growing curve. No gradio here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.base import Host
from lib_estimate.job import Outcome, Progress
from lib_estimate.measuring import measured
from lib_estimate.progress import Cancel, Next, Note, StepReport
from lib_estimate.report.fidelity import Fidelity
from lib_estimate.report.plots import live_curve
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.words import estimate

CURVE_EVERY = 1.0  # seconds
# Where a phase begins in the whole job, as shares of its U-Net forwards at the default effort.
BEGINS = {
    "Recording the target": 0.0,
    "Recording checks": 0.055,
    "Trying numbers": 0.085,
    "Sketching the U-Net": 0.085,
    "Learning (cross-attention)": 0.17,
    "Learning (sketch)": 0.21,
    "Learning": 0.26,
    "Pictures (prompt)": 0.52,
    "Pictures (unweighted)": 0.63,
    "Sentences": 0.74,
    "Noise": 0.83,
    "Pictures (embedding)": 0.86,
}
REPORT = BEGINS["Pictures (prompt)"]  # which is made once, of all words together
SAME = {"Pictures (empty)": "Pictures (unweighted)", "Other prompts": "Sentences"}
ENDS = dict(zip(BEGINS, [*list(BEGINS.values())[1:], 1.0], strict=True))


@dataclass(frozen=True)
class View:
    """A moment of a run. `fraction` never falls; `curve` is None where nothing new is to be drawn."""

    fraction: float
    seconds_left: float | None
    words: str
    notes: tuple[str, ...]
    curve: Image.Image | None
    outcome: Outcome | None


@dataclass
class Watcher:
    """Turns a job's progress into views."""

    request: EstimateRequest
    started: float = field(default_factory=time.monotonic)
    fraction: float = 0.0
    notes: list[str] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    errors: list[tuple[int, float]] = field(default_factory=list)
    drawn: float = 0.0
    before: int = 0  # steps of earlier stages
    part: str = ""
    word: int = 1  # of several that a run makes
    words: int = 1

    def see(self, progress: Progress) -> View:
        words = ""
        if isinstance(progress, Next):
            self.word, self.words, words = progress.number, progress.total, progress.text
        elif isinstance(progress, Note):
            self.notes.append(progress.text)
            words = progress.text
        elif isinstance(progress, StepReport):
            words = self._learning(progress)
        elif isinstance(progress, Outcome):
            self.fraction, words = 1.0, "Done."
        else:
            self._move(progress.name, progress.done / max(progress.total, 1))
            words = f"{progress.name}: {progress.done} of {progress.total}"
        outcome = progress if isinstance(progress, Outcome) else None
        return View(self.fraction, self._left(), words, tuple(self.notes), self._curve(outcome), outcome)

    def _move(self, phase: str, share: float) -> None:
        phase = SAME.get(phase, phase)
        begin, end = BEGINS.get(phase, self.fraction), ENDS.get(phase, self.fraction)
        whole = min(1.0, begin + share * (end - begin))
        if whole < REPORT:  # what comes again for each word
            whole = (REPORT * (self.word - 1) + whole) / self.words
        self.fraction = max(self.fraction, whole)

    def _learning(self, report: StepReport) -> str:
        if report.part != self.part:
            self.before, self.part = (self.losses[-1][0] if self.losses else 0), report.part
            if self.errors:  # another part is judged by another measure
                self.errors.append((self.before, math.nan))
        at = self.before + report.step
        self.losses.append((at, report.loss))
        if report.error is not None and math.isfinite(report.error):
            self.errors.append((at, report.error))
        own = f"Learning ({report.part})"
        self._move(own if own in BEGINS else "Learning", report.step / report.steps)
        return (
            f"Learning ({report.part}): step {report.step} of {report.steps}, loss {report.loss:.4f}, "
            f"error {report.best_error:.4f} (it was {report.start_error:.4f} at the start)"
        )

    def _left(self) -> float | None:
        spent = time.monotonic() - self.started
        return spent / self.fraction - spent if self.fraction > 0.05 else None

    def _curve(self, outcome: Outcome | None) -> Image.Image | None:
        now = time.monotonic()
        if not self.losses or (outcome is None and now - self.drawn < CURVE_EVERY):
            return None
        self.drawn = now
        return live_curve(self.losses, self.errors, self._unweighted(outcome))

    def _unweighted(self, outcome: Outcome | None) -> float | None:
        """The error without weights, where the curve's errors are on its scale: learnt in sentences, they are not."""
        in_sentences = self.request.use is Use.ANYWHERE and self.request.part in (Part.AUTO, Part.CROSS_ATTENTION)
        return None if outcome is None or in_sentences else outcome.fidelity.unweighted_noise


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
            yield View(1.0, None, "Measured.", tuple(notes), None, None), progress
            return
        if isinstance(progress, Next):
            number, total, watcher = progress.number, progress.total, Watcher(request)
        elif isinstance(progress, Note):
            notes.append(progress.text)
        words = progress.text if isinstance(progress, Note) else watcher.see(progress).words
        share = max(0.0, (watcher.fraction - REPORT) / (1 - REPORT))
        yield View((number - 1 + share) / total, None, words, tuple(notes), None, None), None
