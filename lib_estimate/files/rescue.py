"""Vectors that can't be saved where they were asked for, after all the work, are saved elsewhere."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding


def save_all(made: Sequence[tuple[Embedding, Path]], *, overwrite: bool) -> None:
    """Saves each embedding at its path. One that can't be is saved in a fresh folder of its own, and the
    EmbeddingFileError says where, and which of the others are where they belong."""
    problems, saved = [], []
    for embedding, path in made:
        try:
            writing.save(embedding, path, overwrite=overwrite)
            saved.append(path)
        except EmbeddingFileError as error:
            problems.append((error, f"{error} {_elsewhere(embedding, path)}"))
    if problems:
        there = f" {' and '.join(map(str, saved))} is saved." if saved else ""
        raise EmbeddingFileError(" ".join(sentence for _, sentence in problems) + there) from problems[0][0]


def _elsewhere(embedding: Embedding, wanted: Path) -> str:
    """Saves an embedding where nothing is yet; the sentence about it."""
    for folder in _fresh_folders():
        path = folder / wanted.name
        try:
            writing.save(embedding, path)
        except EmbeddingFileError:
            with suppress(OSError):
                folder.rmdir()
            continue
        return f"The vectors are not lost: they are in {path}. Move this file into the embeddings folder."
    return "Elsewhere they could not be saved, either."


def _fresh_folders() -> Iterator[Path]:
    """New, empty folders that only this user can read: a temporary one, or else in the user's own."""
    for parent in (tempfile.gettempdir, Path.home):
        with suppress(OSError, RuntimeError):  # none that can be written to; no home
            yield Path(tempfile.mkdtemp(prefix="embedding-estimate-", dir=parent()))
