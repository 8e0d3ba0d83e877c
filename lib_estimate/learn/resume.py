"""What a run keeps beside its file while it learns, so that one whose process died can go on.

Recordings are made again: they are the same for the same request. What is kept is what they were learnt into.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lib_estimate.errors import EmbeddingFileError, EstimateError, RequestError
from lib_estimate.files.claim import claimed, in_use, state_path
from lib_estimate.files.embedding import Vectors
from lib_estimate.files.names import find_existing, key_of
from lib_estimate.files.places import hidden
from lib_estimate.hosts.base import Conditioning, ModelInfo
from lib_estimate.learn.fit import Ended, Fit
from lib_estimate.progress import Cancel, Note
from lib_estimate.request import EstimateRequest, field_value

log = logging.getLogger(__name__)

VERSION = 1
MOST_BYTES = 4 << 30
# Fields that don't change what is learnt.
FREE = ("name", "out", "subfolder", "format", "overwrite", "images", "checkpoint_every", "resume")
BEGUN_ANEW = "A run of this name was stopped at {where}. This one begins anew; --resume would have gone on."
NONE_STOPPED = "No stopped run of this name was found, so it begins anew."
GOES_ON = "It goes on where it was stopped, at {where}. What is learnt from is recorded again, and is the same."
NOT_KEPT = "The run can't be gone on with if it is stopped, for its state was not saved: {why}."
ANEW = "Leave --resume out to begin anew."


@dataclass
class Saved:
    """What the state file holds. Vectors, and whatever has their shape, are on the CPU."""

    name: str
    settings: dict[str, Any]  # of the request
    checkpoints: list[dict[str, Any]]  # name and hash of each
    reads: torch.Tensor  # what the first text encoder makes of the prompt: clip skip, emphasis, embeddings in it
    start: Vectors
    counts: dict[int, float]  # errors by number of vectors
    where: str = "the beginning"
    best: Vectors = field(default_factory=dict)  # of the stages that are done
    losses: list[float] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    fit: dict[str, Any] | None = None  # of the stage that was going on
    ended: dict[str, Any] | None = None  # of the stage before the next one
    finished: bool = False


class RunState:
    """The state file of one run: what was found in it, and what is written into it."""

    def __init__(self, request: EstimateRequest, infos: Sequence[ModelInfo], reads: Conditioning) -> None:
        """Raises EstimateError where a run is to be resumed that was of another request or can't be read.

        reads: the prompt as the model reads it.
        """
        self.request, self.path = request, state_path(Path(request.out), request.name)
        self.about = {
            "name": request.name.strip(),
            "settings": request.record(),
            "checkpoints": [{"name": info.name, "hash": info.hash} for info in infos],
            "reads": reads.hidden.detach().cpu(),
        }
        self.saved: Saved | None = None
        self.untold = [Note(NONE_STOPPED)] if request.resume else []
        self.written = False  # whether the file is of this run
        self.fails = False  # nothing can be written
        self.steps = 0  # of the stage that goes on, when it was written last
        if self.path.exists():
            self._found()

    def _found(self) -> None:
        if not self.request.resume:
            with suppress(EstimateError):
                self.untold = [Note(BEGUN_ANEW.format(where=read(self.path).where))]
            return
        saved = read(self.path)
        self._check(saved)
        self.saved, self.untold = saved, [Note(GOES_ON.format(where=saved.where))]

    def _check(self, saved: Saved) -> None:
        """Refuses what another request has left, or the same under other circumstances."""
        ours = self.about["settings"]
        theirs = EstimateRequest().record() | saved.settings
        other = next((key for key in ours if key not in FREE and ours[key] != theirs[key]), None)
        if other is not None:
            raise RequestError(
                f"The run that was stopped had another request: its {other} was {theirs[other]!r}, not "
                f"{ours[other]!r}. Give the same, or leave --resume out to begin anew.",
                other,
            )
        if not _same_checkpoints(saved.checkpoints, self.about["checkpoints"]):
            names = ", ".join(str(each.get("name")) for each in saved.checkpoints)
            raise EstimateError(f"The run that was stopped was on another checkpoint: {names}. Use that one. {ANEW}")
        same = saved.reads.shape == self.about["reads"].shape
        if not same or not Conditioning(saved.reads.float()).close_to(Conditioning(self.about["reads"].float())):
            raise EstimateError(
                "The model reads the prompt otherwise than when the run was stopped: clip skip, emphasis mode, a LoRA "
                f"or an embedding in the prompt has changed. Set it back. {ANEW}"
            )

    # ---- while it runs ----

    @contextmanager
    def kept(self, cancel: Cancel) -> Iterator[RunState]:
        """The state outlives what nobody wanted: a crash, and the end of the process. It goes when the run has ended,
        is refused or dropped. What an earlier run has left stays until there is something to put in its place."""
        try:
            yield self
        except (EstimateError, KeyboardInterrupt) as error:
            if self.written or cancel.wanted == "discard" or isinstance(error, KeyboardInterrupt):
                self.remove()
            raise
        self.remove()

    def remove(self) -> None:
        with suppress(OSError):
            self.path.unlink(missing_ok=True)

    def start_on(self, device: torch.device) -> tuple[Vectors, dict[int, float]] | None:
        """Where the stopped run began, and its errors by number of vectors; None where this one doesn't go on."""
        if self.saved is None:
            return None
        return {key: rows.to(device) for key, rows in self.saved.start.items()}, self.saved.counts

    def begin(self, start: Vectors, counts: dict[int, float]) -> None:
        """The run knows where it starts."""
        self.saved = Saved(**self.about, start=_on_cpu(start), counts=counts, best=_on_cpu(start))
        self._write()

    def attend(self, fit: Fit) -> None:
        """A stage begins, or goes on where it was."""
        if self.saved.fit is not None:
            fit.restore(self.saved.fit)
        self.steps, fit.keep = fit.steps_run, self._see

    def _see(self, fit: Fit) -> None:
        """Writes where a stage is, every so many steps."""
        every = self.request.checkpoint_every
        if every and fit.steps_run - self.steps >= every and fit.steps_run < fit.stage.steps:
            self.steps = fit.steps_run
            self.saved.where = f"step {fit.steps_run} of {fit.stage.steps} ({fit.stage.goal.value})"
            self.saved.fit, self.saved.ended = fit.state(), None
            self._write()

    def stage_done(self, run: Any, ended: Ended) -> None:
        """run: what the stages came to so far, as in `learning.Run`."""
        self.saved.where = f"the end of its stage {len(run.stages)}"
        self.saved.fit, self.saved.ended = None, ended.state()
        self._came_to(run)

    def done(self, run: Any) -> None:
        """All stages are done; only the report is still to come."""
        self.saved.where, self.saved.fit, self.saved.ended = "the end of the learning", None, None
        self.saved.finished = True
        self._came_to(run)

    def _came_to(self, run: Any) -> None:
        self.saved.best, self.saved.losses = _on_cpu(run.best), list(run.losses)
        self.saved.stages, self.saved.stopped = list(run.stages), run.stopped
        self._write()

    def _write(self) -> None:
        """What can't be written is no reason to stop learning."""
        if not self.request.checkpoint_every or self.fails:
            return
        buffer = io.BytesIO()
        content = {item.name: getattr(self.saved, item.name) for item in fields(Saved)}
        torch.save({"version": VERSION, **content}, buffer)
        temporary = hidden(self.path.parent, key_of(self.request.name))
        try:
            temporary.write_bytes(buffer.getbuffer())
            os.replace(temporary, self.path)
            self.written = True
        except OSError as error:
            self.fails = True
            self.untold.append(Note(NOT_KEPT.format(why=error.strerror or error)))
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)

    def notes(self) -> Iterator[Note]:
        """What the user should know by now, once."""
        while self.untold:
            yield self.untold.pop(0)


def _same_checkpoints(saved: list[dict[str, Any]], ours: list[dict[str, Any]]) -> bool:
    return len(saved) == len(ours) and all(
        a["hash"] == b["hash"] if a.get("hash") and b["hash"] else a.get("name") == b["name"]
        for a, b in zip(saved, ours, strict=True)
    )


def _on_cpu(vectors: Vectors) -> Vectors:
    return {key: rows.detach().cpu().clone() for key, rows in vectors.items()}


# ---- reading without trust ----------------------------------------------------------------------------------------


def read(path: Path) -> Saved:
    """What a state file holds, of which no code is run. EmbeddingFileError where it is none, or damaged."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        # Not `torch.load`, for which see `files.reading`.
        content = torch.serialization.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        if not isinstance(content, dict) or content.pop("version", None) != VERSION:
            raise ValueError("it is of another kind or version")
        saved = Saved(**content)
        _check_kinds(saved)
        return saved
    except Exception as error:  # bytes of unknown origin can raise anything in the parser
        log.debug("%s can't be read", path, exc_info=True)
        raise EmbeddingFileError(
            f"What the stopped run left in {path} can't be read: it is damaged or of another version. {ANEW}"
        ) from error


def stopped_runs(folder: Path) -> list[Saved]:
    """What stopped runs have left in a folder, the newest first; not of those that go on right now."""
    found = []
    for path in Path(folder).glob(".embedding-estimate-*.run"):
        with suppress(EstimateError, OSError):
            saved, age = read(path), path.stat().st_mtime
            if path != state_path(folder, saved.name) or in_use(folder, saved.name):
                continue
            made = find_existing(folder, saved.name)
            if saved.finished and made is not None and made.stat().st_mtime >= age:
                path.unlink()  # it was stopped after its file was saved
                continue
            found.append((age, saved))
    return [saved for _, saved in sorted(found, key=lambda pair: -pair[0])]


def request_of(saved: Saved, folder: str) -> EstimateRequest:
    """The request that goes on with a stopped run. RequestError where its settings are none."""
    given = {name: field_value(name, value) for name, value in saved.settings.items()}
    return EstimateRequest(**{**given, "out": folder, "resume": True})


def drop(folder: Path, name: str) -> None:
    """Removes what a stopped run has left."""
    with claimed(folder, name), suppress(OSError):
        state_path(folder, name).unlink(missing_ok=True)


def _check_kinds(saved: Saved) -> None:
    """ValueError where something is not what it has to be."""
    kinds = {
        "name": str, "settings": dict, "checkpoints": list, "reads": torch.Tensor, "start": dict, "counts": dict,
        "where": str, "best": dict, "losses": list, "stages": list, "stopped": str, "finished": bool,
    }  # fmt: skip
    wrong = [name for name, kind in kinds.items() if not isinstance(getattr(saved, name), kind)]
    wrong += [name for name in ("fit", "ended") if not isinstance(getattr(saved, name), dict | None)]
    if wrong or not all(isinstance(each, dict) for each in (*saved.checkpoints, *saved.stages)):
        raise ValueError(f"wrong kind: {wrong}")
    if not all(isinstance(loss, float) for loss in (*saved.losses, *saved.counts.values())):
        raise ValueError("losses must be numbers")
    more = {**(saved.fit or {}), **(saved.ended or {})}
    for vectors in (saved.start, saved.best, *(more[key] for key in ("vectors", "best", "average") if key in more)):
        shapes = {key: rows.shape for key, rows in vectors.items()}
        if not shapes or shapes != {key: rows.shape for key, rows in saved.start.items()}:
            raise ValueError("vectors of different shapes")
    if not all(rows.isfinite().all() for rows in (*saved.start.values(), *saved.best.values())):
        raise ValueError("vectors that are none")
