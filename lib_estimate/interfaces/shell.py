"""What the tab needs of the program that it stands in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from lib_estimate.hosts.base import Host
from lib_estimate.interfaces.view import View
from lib_estimate.request import EstimateRequest

log = logging.getLogger(__name__)


class Shell(Protocol):
    """The program the tab stands in."""

    live: bool  # whether the tab itself shows how a run goes on; else the program does, by a mechanism of its own

    def host(self) -> Host:
        """The host, with its model; EstimateError where there is none."""

    def checkpoint(self) -> str:
        """The name of the one that a run would use now; blank where there is none."""

    def checkpoints(self) -> Sequence[str]:
        """What else can be loaded, or is."""

    def on(self, checkpoints: Sequence[str]) -> Host:
        """A host of these, to measure on one after the other."""

    def embeddings_folder(self) -> str:
        """Where embeddings are."""

    def start_values(self) -> dict[str, Any]:
        """Request fields that begin with another value than the request's default."""

    def wrap(self, run: Callable, failed: Sequence[Any]) -> Callable:
        """`run` as the program runs long jobs; `failed`: outputs, but the last, for when it raises."""

    def turn(self, task: str) -> AbstractContextManager[None]:
        """The time in which the model is this task's alone, for runs that `wrap` does not wrap."""

    def about(self) -> Mapping[str, str]:
        """The program and its checkpoint, for a bug report; nobody's names, nor paths. May fail."""

    def show(self, view: View) -> None:
        """Shows how a run goes on, where the tab doesn't."""

    def interrupted(self) -> bool:
        """Whether the program's own interrupt was pressed."""

    def styles(self) -> Sequence[tuple[str, str, str]]:
        """The program's styles: name, prompt, negative prompt."""

    def saved(self, request: EstimateRequest, path: Path, picture: Any, description: str) -> None:
        """A file was saved: its name must work in the next generation."""

    def count_tokens(self, text: str, steps: int, negative: bool) -> str:
        """Such as 12/75; ? where nothing can count them yet."""

    def send_buttons(self) -> Sequence[str]:
        """Tabs of the program that have prompts to send the name to."""

    def restore(self, task: str) -> Any:
        """The outputs of a run that another page started."""


def taken_in(shell: Shell, request: EstimateRequest, path: Path, picture: Any, description: str) -> list[str]:
    """Tells the program of the new file; a note where that fails, because the file itself is saved by then."""
    try:
        shell.saved(request, path, picture, description)
    except Exception:
        log.exception("The program could not take in %s", path)
        return ["The file is saved, but the program could not read it in; the log says why. Refresh its embeddings."]
    return []
