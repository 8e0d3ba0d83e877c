"""What a person sees of a running estimate and of its outcome: how far it is, one line in words, a growing curve, and
pictures. No gradio here."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lib_estimate.hosts.base import Host
from lib_estimate.job import Outcome, Progress
from lib_estimate.progress import Cancel, NextWord, Note, StepReport
from lib_estimate.report.fidelity import Fidelity
from lib_estimate.report.in_words import REFERENCES, result_sentence
from lib_estimate.report.plots import live_curve
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.words import estimate

log = logging.getLogger(__name__)

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
        if isinstance(progress, NextWord):
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


def gallery(fidelity: Fidelity, title: str) -> list[tuple[Image.Image, str]]:
    """Pictures row by row, each with its title; of several checkpoints one after the other. title: of the word's."""
    if not fidelity.checkpoints:
        return _rows(fidelity, {"prompt": "prompt", "embedding": title, **REFERENCES})
    titles = {"embedding": title, **REFERENCES}
    several = fidelity.checkpoints
    return [shown for one in several for shown in _rows(one.fidelity, {"prompt": f"prompt, {one.name}", **titles})]


def _rows(fidelity: Fidelity, titles: Mapping[str, str]) -> list[tuple[Image.Image, str]]:
    columns = {
        titles[name]: [Image.fromarray((p.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for p in batch]
        for name, batch in fidelity.pictures.items()
    }
    rows = max(map(len, columns.values()), default=0)
    return [(images[row], title) for row in range(rows) for title, images in columns.items()]


def cards(outcome: Outcome, request: EstimateRequest) -> list[tuple[Path, Image.Image | None, str]]:
    """What a program shows of new files: where each is, its own picture, a description."""
    own = next((image for image, title in gallery(outcome.fidelity, outcome.title) if title == outcome.title), None)
    texts = [word["text"] for word in outcome.record.get("words", [])] or [request.text]
    said = result_sentence(outcome.fidelity, outcome.title)
    paths = (outcome.path, *outcome.others)
    return [(path, own, f"{said}\n\n{text}") for path, text in zip(paths, texts, strict=True)]


class TakesIn(Protocol):
    """A program that is told of new files; see `interfaces.tab.Shell`."""

    def saved(self, request: EstimateRequest, path: Path, picture: Any, description: str) -> None: ...


def taken_in(program: TakesIn, request: EstimateRequest, path: Path, picture: Any, description: str) -> list[str]:
    """Tells the program of the new file; a note where that fails, because the file itself is saved by then."""
    try:
        program.saved(request, path, picture, description)
    except Exception:
        log.exception("The program could not take in %s", path)
        return ["The file is saved, but the program could not read it in; the log says why. Refresh its embeddings."]
    return []
