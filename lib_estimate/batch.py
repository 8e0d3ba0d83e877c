"""Many requests, one model: all are checked first, then made one after the other.

A line that fails doesn't stop the rest, and a line whose file is there already, made of the same prompt with the same
settings on the same checkpoint, is left alone. So a batch that was stopped goes on where it was when it is run again.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lib_estimate.errors import EstimateError, RequestError
from lib_estimate.files import names, reading
from lib_estimate.files.destination import first_name
from lib_estimate.files.embedding import Embedding
from lib_estimate.files.lists import Line
from lib_estimate.hosts.base import Host, ModelInfo
from lib_estimate.hosts.several import sessions_of
from lib_estimate.job import Outcome, Progress, check_destination
from lib_estimate.progress import Cancel, Interrupted
from lib_estimate.request import EstimateRequest, forwards_of_a_picture
from lib_estimate.words import estimate

log = logging.getLogger(__name__)

NOT_STARTED, MADE, THERE = "not started", "made", "made before"
STOPPED = "interrupted, the best so far is saved"
DROPPED = "interrupted, nothing saved"
STOPPED_BEFORE = "made before, but interrupted: --overwrite makes it again"
FAILED = "failed: "
WHERE = ("name", "out", "subfolder", "overwrite", "checkpoint_every", "resume")  # fields that don't change what is made
HEADINGS = ("name", "vectors", "picture error", "recovered", "cost in pictures", "state")
PATIENCE = 600.0  # seconds without a sign of life after which another process is given up


@dataclass(frozen=True)
class Row:
    """What became of a line. Of several checkpoints it has the worst figures."""

    name: str
    vectors: int | None = None
    picture_error: float | None = None
    recovered: float | None = None
    pictures: float | None = None  # what it cost, in pictures
    state: str = NOT_STARTED

    @property
    def failed(self) -> bool:
        return self.state.startswith(FAILED)


@dataclass(frozen=True)
class Share:
    """Which lines this process makes: every `count`-th from `rank` on. `local`: its number on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Share:
        """As `accelerate launch` and `torchrun` say it."""
        rank, count, local = (int(environment.get(key) or 0) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, count, local) if count > 1 else cls()


@dataclass(frozen=True)
class Moment:
    """Something a line tells while it runs; last, a Row."""

    number: int  # of the line, from 1
    total: int
    line: Line
    progress: Progress | Row


class Batch:
    """A checked list, and in `rows` what became of each line so far."""

    def __init__(self, lines: Sequence[Line], share: Share | None = None) -> None:
        """Raises RequestError with a sentence for each line that can't be made. Needs no model."""
        self.lines, self.share = lines, share or Share()
        self.rows = [Row(line.request.name.strip()) for line in lines]
        self.there = _checked(lines)

    def run(self, host: Host, cancel: Cancel) -> Iterator[Moment]:
        """Makes this process's lines. An interrupted line saves its best vectors, and is the last."""
        host = host.without({line.request.name for line in self.lines})
        self._compare_checkpoints(host)
        for index in range(self.share.rank, len(self.lines), self.share.count):
            if cancel.wanted is not None:
                return
            for progress in self._make(index, host, cancel):
                yield Moment(index + 1, len(self.lines), self.lines[index], progress)

    def _compare_checkpoints(self, host: Host) -> None:
        """A word for another checkpoint is another word."""
        if not self.there:
            return
        with sessions_of(host) as sessions:
            infos = [session.info for session in sessions]
        for index, embedding in list(self.there.items()):
            request = self.lines[index].request
            made_on = ", ".join(str(made["name"]) for made in _made_on(embedding))
            if not _same_checkpoints(embedding, infos):
                del self.there[index]
                if not request.overwrite:
                    said = f"a file of this name exists, made on {made_on}. Choose another name, or --overwrite."
                    self.rows[index] = Row(request.name, state=FAILED + said)

    def _make(self, index: int, host: Host, cancel: Cancel) -> Iterator[Progress | Row]:
        line, embedding = self.lines[index], self.there.get(index)
        name = self.rows[index].name
        if embedding is not None and not (line.request.overwrite and not _finished(embedding)):
            self.rows[index] = _row(embedding, THERE if _finished(embedding) else STOPPED_BEFORE)
        elif not self.rows[index].failed:
            try:
                for progress in estimate(line.request, host, cancel):
                    if isinstance(progress, Outcome):
                        state = MADE if _finished(progress.embedding) else STOPPED
                        self.rows[index] = _row(progress.embedding, state)
                    yield progress
            except (Interrupted, KeyboardInterrupt):
                cancel.discard()
                self.rows[index] = Row(name, state=DROPPED)
            except EstimateError as error:
                self.rows[index] = Row(name, state=FAILED + str(error))
            except Exception as error:  # one line's trouble is not the others'
                log.exception("%s (%s) failed", line.place, name)
                said = next(iter(str(error).splitlines()), "")
                self.rows[index] = Row(name, state=f"{FAILED}unexpected {type(error).__name__}: {said}")
        yield self.rows[index]


def _checked(lines: Sequence[Line]) -> dict[int, Embedding]:
    """The embeddings that are there already, by the line that made them. Raises RequestError with all that is wrong."""
    problems, first, there = [], {}, {}
    for index, line in enumerate(lines):
        name = names.folded(line.request.name)
        try:
            if name and name in first:
                raise RequestError(f'the name "{line.request.name}" is taken by {first[name]} already.')
            first[name] = line.place
            embedding = _made_before(line.request)
            if embedding is not None:
                there[index] = embedding
        except EstimateError as error:
            problems.append(f"{line.place}: {error}")
    if problems:
        raise RequestError("\n".join(problems))
    return there


def _made_before(request: EstimateRequest) -> Embedding | None:
    """The embedding that this very request made; EstimateError where its name is taken by something else."""
    for name in dict.fromkeys((request.name, first_name(request))):  # of one text, --stages makes one word
        path = check_destination(replace(request, name=name, overwrite=True))
        if not path.exists():
            continue
        with suppress(EstimateError):  # what can't be read is something else
            embedding = reading.load(path)
            if _same_settings(embedding.metadata.get("settings"), request):
                return embedding
    if request.overwrite or not path.exists():
        return None
    raise RequestError(
        f"{path} exists already, made of something else or with other settings. Choose another name, or allow "
        "overwriting (--overwrite)."
    )


def _same_settings(settings: Any, request: EstimateRequest) -> bool:
    if not isinstance(settings, dict):
        return False
    made = EstimateRequest().record() | settings  # an older file lacks what has come since
    return all(made[key] == value for key, value in request.record().items() if key not in WHERE)


def _made_on(embedding: Embedding) -> list[dict[str, Any]]:
    """Name and hash of each checkpoint."""
    about = embedding.metadata
    one = {"name": about.get("sd_checkpoint_name"), "hash": about.get("sd_checkpoint")}
    return about.get("checkpoints") or [one]


def _same_checkpoints(embedding: Embedding, infos: Sequence[ModelInfo]) -> bool:
    made_on = _made_on(embedding)
    return len(made_on) == len(infos) and all(
        made["hash"] == info.hash if made["hash"] and info.hash else made["name"] == info.name
        for made, info in zip(made_on, infos, strict=True)
    )


def _finished(embedding: Embedding) -> bool:
    """Whether nobody interrupted the learning, and the report was made."""
    stages = embedding.metadata.get("stages") or []
    return "forwards" in embedding.metadata and not any(stage.get("stopped") == "interrupted" for stage in stages)


def _row(embedding: Embedding, state: str) -> Row:
    about = embedding.metadata
    picture = forwards_of_a_picture(about["settings"]["sampling_steps"], about["settings"]["cfg_scale"])
    forwards = sum(about.get("forwards", {}).values())
    vectors, rows = len(next(iter(embedding.vectors.values()))), about.get("checkpoints") or [about]
    off, recovered = ([row[key] for row in rows if row.get(key) is not None] for key in ("picture_error", "recovered"))
    return Row(embedding.name, vectors, max(off, default=None), min(recovered, default=None), forwards / picture, state)


# ---- the table ----------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """A row as text, in the order of HEADINGS."""
    numbers = [(row.picture_error, ".3f"), (row.recovered, ".3f"), (row.pictures, ".1f")]
    shown = ["" if number is None else format(number, form) for number, form in numbers]
    return [row.name, "" if row.vectors is None else str(row.vectors), *shown, row.state]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, and below them how many there are of each kind."""
    lines = [list(HEADINGS), *map(cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS) - 1)]
    aligned = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:]), line[-1]]) for line in lines
    ]
    return "\n".join([*aligned, summary(rows), ""])


def summary(rows: Sequence[Row]) -> str:
    kinds = [re.split("[:,]", row.state)[0] for row in rows]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{len(rows)} lines: {counted}."


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """The table as csv, with all digits."""
    try:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(heading.replace(" ", "_") for heading in HEADINGS)
            writer.writerows(asdict(row).values() for row in rows)
    except OSError as error:
        raise EstimateError(f"The table was not written to {path}: {error.strerror or error}.") from error


# ---- several processes --------------------------------------------------------------------------------------------


class Ledger:
    """The rows of several processes: each keeps a small file beside the table, and the first one gathers them."""

    def __init__(self, beside: Path, batch: Batch) -> None:
        self.batch, self.share = batch, batch.share
        self.paths = [beside.with_name(f"{beside.name}.part{rank}.json") for rank in range(self.share.count)]
        self.written = 0.0

    def write(self, *, done: bool = False) -> None:
        """This process's rows, as a sign of life, too."""
        self.written = time.monotonic()
        path = self.paths[self.share.rank]
        whose = {"names": [line.request.name for line in self.batch.lines], "count": self.share.count}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(
            json.dumps({**whose, "done": done, "rows": list(map(asdict, self._own()))}), encoding="utf-8"
        )
        os.replace(temporary, path)

    def alive(self) -> None:
        """To be called often; writes now and then."""
        if time.monotonic() - self.written > PATIENCE / 20:
            self.write()

    def gather(self) -> list[Row]:
        """The rows of all, once every process is done or has gone silent. The files go."""
        rows = list(self.batch.rows)
        for rank, path in enumerate(self.paths):
            if rank != self.share.rank:
                rows[rank :: self.share.count] = self._awaited(rank, path, rows[rank :: self.share.count])
        for path in self.paths:
            path.unlink(missing_ok=True)
        return rows

    def _own(self) -> list[Row]:
        return self.batch.rows[self.share.rank :: self.share.count]

    def _awaited(self, rank: int, path: Path, unknown: list[Row]) -> list[Row]:
        names_, since = [line.request.name for line in self.batch.lines], time.time()
        while True:
            told = None
            with suppress(OSError, ValueError):  # not there yet
                told = json.loads(path.read_text(encoding="utf-8"))
                since = max(since, path.stat().st_mtime)
            if told and (told["names"], told["count"]) == (names_, self.share.count):
                rows = [Row(**row) for row in told["rows"]]
                if told["done"]:
                    return rows
                unknown = rows
            if time.time() - since > PATIENCE:
                lost = f"{FAILED}process {rank} went silent"
                return [replace(row, state=lost) if row.state == NOT_STARTED else row for row in unknown]
            time.sleep(0.2)
