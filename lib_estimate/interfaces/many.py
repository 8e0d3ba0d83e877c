"""What the command `batch` does: a list of requests in this process, or this process's share of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib_estimate.batch import Batch, Ledger, Row, Share, table, write_table
from lib_estimate.errors import EstimateError
from lib_estimate.files import lists
from lib_estimate.files.places import check_place
from lib_estimate.job import Outcome
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest, ModelOptions

STOPPED_BY_USER = 130  # exit status, as shells have it


def run(
    file: Path,
    listed: lists.Listed,
    common: EstimateRequest,
    options: Sequence[ModelOptions],
    table_file: Path | None,
    bars: Callable[[], Any],
    interrupts: Callable[[Cancel], AbstractContextManager[None]],
) -> int:
    """Makes every line that was listed in the file; returns the exit status. `bars()` shows progress,
    `interrupts(cancel)` hears Ctrl-C. options: of each checkpoint."""
    share = Share.of(os.environ)
    lines, notes = listed
    batch = Batch(lines, share)
    if table_file is not None:
        check_place(table_file, "--table", in_place=True)
    beside = _beside(file, common, table_file)
    ledger = Ledger(beside, batch) if share.count > 1 else None
    cancel = Cancel()
    for note in notes if share.rank == 0 else ():
        sys.stderr.write(f"note: {note}\n")
    try:
        _make(
            batch, Path(common.out), [own_device(each, share) for each in options], cancel, ledger, (bars, interrupts)
        )
    except KeyboardInterrupt:  # what was made before is there, and the table tells of it
        cancel.discard()
    finally:
        if ledger is not None:
            ledger.write(done=True)
    if share.rank:
        return 0  # a launcher ends the other processes as soon as one fails; the first one tells for all
    rows = batch.rows if ledger is None else ledger.gather()
    sys.stdout.write(table(rows))
    if table_file is not None:
        write_table(table_file, rows)
    if cancel.wanted is not None:
        return STOPPED_BY_USER
    return 1 if any(row.failed for row in rows) else 0


def _beside(file: Path, common: EstimateRequest, table_file: Path | None) -> Path:
    """The table, or where it would be. Its folder is made now, so that what is wrong with it is known at once."""
    place = table_file or Path(common.out) / f"{file.stem}.batch"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EstimateError(f"{place.parent} can't be made: {error.strerror or error}.") from error
    return place


def own_device(options: ModelOptions, share: Share) -> ModelOptions:
    """The model options with a GPU of this process's own, where several processes share a machine."""
    import torch

    if share.count == 1 or options.device not in ("auto", "cuda") or not torch.cuda.is_available():
        return options
    return replace(options, device=f"cuda:{share.local % torch.cuda.device_count()}")


def _make(
    batch: Batch, folder: Path, options: Sequence[ModelOptions], cancel: Cancel, ledger: Ledger | None, around: tuple
) -> None:
    from lib_estimate.hosts.several import together
    from lib_estimate.hosts.standalone import StandaloneHost

    if ledger is not None:
        ledger.write()
    host, (bars, interrupts) = together([StandaloneHost(each, folder) for each in options]), around
    begun = 0
    with interrupts(cancel), bars() as bar:
        for moment in batch.run(host, cancel):
            line, progress = moment.line, moment.progress
            if moment.number != begun:
                begun = moment.number
                sys.stderr.write(f"\n{line.place}: {line.request.name.strip()} ({begun} of {moment.total})\n")
            if isinstance(progress, Row):
                bar.__exit__()
                sys.stderr.write(f"{progress.name}: {progress.state}\n")
            elif not isinstance(progress, Outcome):
                bar.show(progress)
            if ledger is not None:
                ledger.write() if isinstance(progress, Row) else ledger.alive()
