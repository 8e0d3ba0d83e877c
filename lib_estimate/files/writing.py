"""Atomic writing: a folder holds the old file or the new one, whole, and never one that can't be read back."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files.embedding import RECORD_KEY, Embedding, plain_vectors
from lib_estimate.files.names import FORMATS, check_name, key_of
from lib_estimate.files.places import hidden
from lib_estimate.files.reading import read_as


def save(embedding: Embedding, path: Path, *, overwrite: bool = False) -> None:
    """Writes the embedding, in the format of the path's ending, or raises and leaves the folder as it was.

    The vectors are written as float32. What was written is read back and compared before it gets its name. NaN and
    infinity in the metadata become null, as JSON has neither; in the vectors they are refused.
    """
    path = Path(path)
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise EmbeddingFileError(f"{path.name} can't be written. An embedding ends in: .{', .'.join(FORMATS)}.")
    if embedding.name != path.stem or check_name(path.stem) != path.stem:
        raise EmbeddingFileError(
            f'The embedding "{embedding.name}" can\'t be saved as {path.name}: webuis call it by the name of its file. '
            "Give both the same name."
        )
    plain = Embedding(
        embedding.name,
        plain_vectors(embedding.vectors, f'The embedding "{embedding.name}" was not saved'),
        _plain_json(embedding.metadata, "metadata"),
    )
    data = _pt_bytes(plain) if path.suffix.lower() == ".pt" else _safetensors_bytes(plain)
    if not overwrite and os.path.lexists(path):  # before any work on the disk; _publish makes it certain
        raise _taken(path)
    _write(plain, data, path, overwrite)


def _write(plain: Embedding, data: bytes, path: Path, overwrite: bool) -> None:
    temporary = hidden(path.parent, key_of(path.stem))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _verify(plain, temporary, path)
        _publish(temporary, path, overwrite)
    except OSError as error:
        raise EmbeddingFileError(
            f"{path.name} was not saved in {path.parent}: {error.strerror or error}. "
            "Check that the folder can be written to and that the disk has room, or save elsewhere."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _verify(plain: Embedding, temporary: Path, path: Path) -> None:
    cause = None
    try:
        if _same(plain, read_as(temporary, path)):
            return
    except EmbeddingFileError as error:
        cause = error
    raise EmbeddingFileError(
        f"{path.name} was not saved: read back from the disk, it is not what was written. "
        f"Check the disk that holds {path.parent}, or save elsewhere."
    ) from cause


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Gives the finished file its name. Without `overwrite`, not even a file that appeared just now is replaced."""
    if overwrite:
        os.replace(temporary, path)
        return
    try:
        os.link(temporary, path)  # fails if the name is taken; the temporary name is removed by the caller
        return
    except FileExistsError:
        raise _taken(path) from None
    except OSError:
        pass  # no hard links on this file system (exFAT, some network drives)
    if os.path.lexists(path):
        raise _taken(path)
    # On Windows this never replaces a file. Elsewhere it would replace one that appeared since the look just now; but
    # to claim the name with an empty file first would leave that, where the process is killed before this line.
    os.rename(temporary, path)


def _taken(path: Path) -> EmbeddingFileError:
    return EmbeddingFileError(
        f"{path} exists already and was left as it is. Choose another name, or allow it to be overwritten."
    )


def _pt_bytes(plain: Embedding) -> bytes:
    if len(plain.vectors) > 1:
        raise EmbeddingFileError(
            "An SDXL embedding can't be saved as .pt: webuis take everything in such a file for vectors, which leaves "
            "no room for the record of how it was made. Save SDXL as safetensors."
        )
    (vectors,) = plain.vectors.values()
    content = {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": plain.name,
        **_promoted(plain.metadata),
        RECORD_KEY: json.dumps(plain.metadata),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _safetensors_bytes(plain: Embedding) -> bytes:
    tensors = plain.vectors if len(plain.vectors) > 1 else {"emb_params": next(iter(plain.vectors.values()))}
    header = {"format": "pt", "name": plain.name, RECORD_KEY: json.dumps(plain.metadata)}
    for key, value in _promoted(plain.metadata).items():
        if value is not None:
            # Half characters, such as undecodable file names hold, are no UTF-8; the record keeps them escaped.
            header[key] = str(value).encode("utf-8", "replace").decode()
    return safetensors.torch.save(tensors, header)


def _promoted(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The entries webuis show or reckon with, None where there is none of the right kind."""
    kinds = {"step": int, "sd_checkpoint": str, "sd_checkpoint_name": str}
    return {key: value if isinstance(value := metadata.get(key), kind) else None for key, kind in kinds.items()}


def _plain_json(value: Any, where: str) -> Any:
    """A copy as JSON gives it back: tuples are lists, keys are text, NaN and infinity are None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain_json(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise EmbeddingFileError(
        f"The embedding was not saved: its {where} is a {type(value).__name__}, which JSON can't hold. "
        "Use text, numbers, lists and dictionaries."
    )


def _same(written: Embedding, read: Embedding) -> bool:
    """Bit for bit, and whatever a single tensor is called (`load` can't know)."""
    ours, theirs = written.vectors, read.vectors
    if len(ours) == len(theirs) == 1:
        theirs = dict(zip(ours, theirs.values(), strict=True))
    return (
        written.name == read.name
        and written.metadata == read.metadata
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[key].view(torch.int32), theirs[key].view(torch.int32)) for key in ours)
    )
