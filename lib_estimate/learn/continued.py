"""An existing embedding as the start of a run: where its file is, what is in it, how far it has come."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_estimate.errors import EmbeddingFileError, EstimateError
from lib_estimate.files import names, reading
from lib_estimate.files.embedding import Embedding, Vectors
from lib_estimate.hosts.base import ModelInfo
from lib_estimate.request import EstimateRequest


@dataclass(frozen=True)
class Continued:
    """The embedding a run goes on from."""

    embedding: Embedding

    @property
    def steps(self) -> int:
        """Learning steps that are in it; 0 where the file doesn't say. A safetensors header has them as text."""
        said = self.embedding.metadata.get("step")
        if isinstance(said, str) and re.fullmatch("[0-9]{1,12}", said):
            return int(said)
        return said if isinstance(said, int) and 0 <= said < 10**12 else 0

    @property
    def vectors(self) -> int:
        return len(next(iter(self.embedding.vectors.values())))

    def facts(self) -> dict[str, Any]:
        """What the new file remembers of it."""
        return {"continued_from": {"name": self.embedding.name, "step": self.steps, "vectors": self.vectors}}


def continued(request: EstimateRequest) -> Continued | None:
    """The embedding a request continues, read anew; None where it begins with a text. EmbeddingFileError where there
    is none of that name, or it can't be read."""
    given = request.continue_from.strip()
    return Continued(reading.load(find_embedding(given, Path(request.out)))) if given else None


def find_embedding(given: str, folder: Path) -> Path:
    """The file that is meant by a path, by a path inside of the folder, or by a name there."""
    paths = [path for path in (os.path.expanduser(given), folder / given) if os.path.isfile(path)]
    named = [path for path in paths if Path(path).suffix.lower() in names.EMBEDDING_SUFFIXES]
    # A file without such an ending may lie where the program was started, and is not what a name means.
    found = next(iter(named), None) or names.find_readable(folder, given) or next(iter(paths), None)
    if found is None:
        raise EmbeddingFileError(
            f"There is no embedding {given!r}: neither a file of that path nor one of that name in {folder}."
        )
    return Path(found)


def fitting_vectors(embedding: Embedding, info: ModelInfo) -> Vectors:
    """The embedding's vectors under the model's own keys; EstimateError where their widths differ."""
    rows = list(embedding.vectors.values())
    widths = [r.shape[1] for r in rows]
    if widths != list(info.widths.values()):
        raise EstimateError(
            f"{embedding.name} holds vectors of width {', '.join(map(str, widths))}, the model {info.name} needs "
            f"{', '.join(map(str, info.widths.values()))}: it was made for another kind of model."
        )
    return {key: r.to(info.device) for key, r in zip(info.widths, rows, strict=True)}
