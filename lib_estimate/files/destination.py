"""Where the embedding of a request will be, as far as that is known without the model."""

from __future__ import annotations

from pathlib import Path

from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files import names
from lib_estimate.files.places import check_place
from lib_estimate.request import EstimateRequest, Format


def first_name(request: EstimateRequest) -> str:
    """The name of the first embedding that a request makes, as far as that is known before the prompt is read."""
    return f"{request.name.strip()}-1" if request.stages else request.name


def free_path(request: EstimateRequest) -> Path:
    """The file that a request of one embedding will write; EmbeddingFileError where its name can't be used or is taken,
    or where no file can be written.

    A name is taken by a file of any format, in the folder or below it. Overwriting replaces that very file.
    """
    folder, name = Path(request.out), names.check_name(request.name)
    suffix = Format.PT.value if request.format is Format.AUTO else request.format.value
    path = names.embedding_path(folder / request.subfolder, name, suffix)
    try:
        existing = path if path.exists() else names.find_existing(folder, name)
    except OSError as error:  # such as a folder whose name is too long
        raise EmbeddingFileError(f"{path.parent} can't be looked at: {error.strerror or error}.") from error
    if existing is None:
        check_place(path, "The embedding")
        return path
    if not request.overwrite:
        raise EmbeddingFileError(f"{existing} exists already. Choose another name, or allow overwriting (--overwrite).")
    if existing.suffix.lower().lstrip(".") not in names.FORMATS:
        raise EmbeddingFileError(
            f"{existing} has this name, and can't be overwritten: it is no .pt or .safetensors file."
        )
    check_place(existing, "The embedding")
    return existing
