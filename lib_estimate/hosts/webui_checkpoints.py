"""Checkpoints of the webui's, loaded one after the other for a measurement.

Leans on, alike in AUTOMATIC1111 1.10.1 and the Forge family: `sd_models.checkpoint_tiles` and `checkpoint_aliases`,
which knows a checkpoint by its title; and on what each family's file has for `chosen_checkpoint` and `use_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from modules import sd_models

from lib_estimate.errors import ModelError
from lib_estimate.hosts.base import Host
from lib_estimate.hosts.family import family
from lib_estimate.hosts.several import Several
from lib_estimate.hosts.webui_session import WebuiHost, WebuiSession


def titles() -> list[str]:
    """Of the checkpoints that there are, as the webui's own menu shows them."""
    return list(sd_models.checkpoint_tiles())


class Checkpoint(WebuiHost):
    """The webui with a checkpoint of its choice, which is loaded when a session begins, and stays."""

    def __init__(self, title: str, *, locked: bool) -> None:
        super().__init__(locked=locked)
        self.title, self.found = title, None

    @contextmanager
    def session(self, *, tags: bool = False) -> Iterator[WebuiSession]:
        self.found = sd_models.checkpoint_aliases.get(self.title)
        if self.found is None:
            raise ModelError(f"There is no checkpoint {self.title!r} any more. Read the list again.")
        try:
            family().use_checkpoint(self.found)
        except Exception as error:  # whatever it was, it is the checkpoint that could not be loaded
            raise ModelError(f"The webui could not load {self.title}: {error}") from error
        with super().session(tags=tags) as session:
            yield session


class InTurn(Several):
    """Checkpoints of these titles. At the end the one from before is loaded again."""

    def __init__(self, chosen: Sequence[str], *, locked: bool) -> None:
        super().__init__([Checkpoint(title, locked=locked) for title in chosen])

    def in_turn(self) -> Generator[tuple[int, int, Host], None, None]:
        before = known = family().chosen_checkpoint()
        try:
            for number, host in enumerate(self.hosts, 1):
                yield number, len(self.hosts), host
                if family().chosen_checkpoint() not in (known, host.found):
                    before = family().chosen_checkpoint()  # somebody has chosen another one meanwhile
                known = family().chosen_checkpoint()
        finally:
            family().use_checkpoint(before)
