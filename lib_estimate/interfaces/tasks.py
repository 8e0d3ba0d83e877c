"""Tasks of the HTTP API: they wait in a queue, run one after the other in a thread of their own, and are remembered a
while. Nothing of HTTP here.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from lib_estimate.errors import EstimateError
from lib_estimate.interfaces.view import View
from lib_estimate.progress import Cancel, Interrupted

log = logging.getLogger(__name__)

MOST_WAITING = 50
KEPT = 20  # finished tasks
KEPT_BYTES = 256 * 2**20  # of their pictures
OUT_OF_MEMORY = "Out of memory. Make width and height, or batch, smaller."


class State(str, Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    INTERRUPTED = "interrupted"  # and nothing came of it


class TooMany(EstimateError):
    """More tasks wait than are taken."""


@dataclass(frozen=True)
class Result:
    """What a task ends with."""

    record: dict[str, Any]
    pictures: list[tuple[str, bytes]]  # title, PNG
    notes: tuple[str, ...]


Work = Callable[[Cancel], Iterator[View | Result]]  # the Result comes last


@dataclass
class Task:
    """One job, how far it is and what came of it."""

    work: Work | None  # None once it is over
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    cancel: Cancel = field(default_factory=Cancel)
    state: State = State.WAITING
    fraction: float = 0.0
    seconds_left: float | None = None
    words: str = "Waiting for its turn."
    notes: tuple[str, ...] = ()
    result: Result | None = None

    @property
    def over(self) -> bool:
        return self.state not in (State.WAITING, State.RUNNING)

    @property
    def size(self) -> int:
        return 0 if self.result is None else sum(len(png) for _, png in self.result.pictures)

    def see(self, step: View | Result) -> None:
        if isinstance(step, Result):
            self.result, self.notes = step, step.notes
        else:
            self.fraction, self.seconds_left, self.notes = step.fraction, step.seconds_left, step.notes
            self.words = step.words

    def end(self, state: State, words: str) -> None:
        self.work, self.seconds_left, self.words = None, None, words
        self.state = state


class Tasks:
    """All tasks of a program. turn(id): the time in which the program's model is that task's alone."""

    def __init__(self, turn: Callable[[str], AbstractContextManager[None]]) -> None:
        self.turn = turn
        self.lock = threading.Lock()
        self.known: dict[str, Task] = {}  # in the order in which they came
        self.worker: threading.Thread | None = None

    def add(self, work: Work) -> Task:
        """A new task, last in the queue; TooMany where that is full."""
        with self.lock:
            if sum(task.state is State.WAITING for task in self.known.values()) >= MOST_WAITING:
                raise TooMany(f"{MOST_WAITING} tasks are waiting already. Try again when some of them are done.")
            task = Task(work)
            self.known[task.id] = task
            if self.worker is None:  # ends with the queue, so that none is left where the program starts anew
                self.worker = threading.Thread(target=self._run, name="embedding-estimate-api", daemon=True)
                self.worker.start()
        return task

    def find(self, identifier: str) -> Task | None:
        return self.known.get(identifier)

    def before(self, task: Task) -> int:
        """How many tasks are waiting or running before this one."""
        with self.lock:
            earlier = list(self.known.values())
        return sum(not other.over for other in earlier[: earlier.index(task)]) if task in earlier else 0

    def interrupt(self, task: Task, *, save: bool) -> bool:
        """Stops a task, with the best so far saved or not; one that waits never begins. False where it is over."""
        with self.lock:
            if task.over:
                return False
            task.cancel.save() if save else task.cancel.discard()
            if task.state is State.WAITING:
                task.end(State.INTERRUPTED, "Interrupted before it began. Nothing was saved.")
                self._forget()
        return True

    def _run(self) -> None:
        while True:
            with self.lock:
                task = next((task for task in self.known.values() if task.state is State.WAITING), None)
                if task is None:
                    self.worker = None
                    return
            state, words = self._ended(task)
            with self.lock:
                if not task.over:
                    task.end(state, words)
                self._forget()

    def _ended(self, task: Task) -> tuple[State, str]:
        """Runs a task; whatever goes wrong becomes a sentence."""
        try:
            with self.turn(task.id):
                with self.lock:
                    if task.over:  # interrupted while the program did something else
                        return task.state, task.words
                    task.state = State.RUNNING
                for step in task.work(task.cancel):
                    task.see(step)
            task.fraction = 1.0
            return State.DONE, "Done."
        except Interrupted as error:
            return State.INTERRUPTED, str(error)
        except EstimateError as error:
            log.info("Refused or stopped: %s", error)
            return State.FAILED, str(error)
        except Exception as error:  # the last place where it can become a sentence
            log.exception("The task failed")
            memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
            return State.FAILED, OUT_OF_MEMORY if memory else f"Unexpected {type(error).__name__}: {error}"

    def _forget(self) -> None:
        """The oldest that are over, where there are many or their pictures are large."""
        over = [task for task in self.known.values() if task.over]
        while len(over) > KEPT or (len(over) > 1 and sum(task.size for task in over) > KEPT_BYTES):
            del self.known[over.pop(0).id]
