"""Reading without trust: files of anyone, in every format known, without running what is in them.

Files are read into memory first and parsed there. Forge wraps `torch.load` and `safetensors.torch.load_file` so that a
failure renames the file whose path was among the arguments, and AUTOMATIC1111 wraps `torch.load` with a check that can
only open paths. `torch.serialization.load` and `safetensors.torch.load` are the same functions, unwrapped.
"""

from __future__ import annotations

import base64
import io
import json
import re
import stat
import struct
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files import containers
from lib_estimate.files.embedding import (
    MAX_FILE_BYTES,
    PAIR_KEYS,
    RECORD_KEY,
    SINGLE_KEY,
    Embedding,
    listed,
    plain_vectors,
    shown,
)
from lib_estimate.files.names import EMBEDDING_SUFFIXES, IMAGE_SUFFIXES, TORCH_SUFFIXES

FOREIGN_KEYS = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")

# Only the start of what the two containers of torch look like; what follows is for torch to judge.
ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEYWORD = b"sd-ti-embedding"
MAX_CARD_TEXT = 16 << 20  # more than 700 vectors; read, a text takes up to 20 times as much room
MOST_CHUNKS = 100_000  # of a picture that are looked at
LARGEST_NUMBER = 2**63


def load(path: Path) -> Embedding:
    """Reads an embedding file, ours or anyone's. The file is never changed, renamed or moved, and no code in it runs.

    Vectors are float32 `[N, width]`. A file with one tensor gives the key "clip_l" for want of a better one: a caller
    who knows the model renames it. Metadata is our record if there is one, else what the file says about itself.
    """
    return read_as(Path(path), Path(path))


def read_as(file: Path, path: Path) -> Embedding:
    """Reads `file` as if it were called `path`."""
    data = _file_bytes(file)
    suffix = path.suffix.lower()
    if suffix in TORCH_SUFFIXES:
        tensors, metadata = _read_dict(_torch_content(data, path), path)
        name = path.stem
    elif suffix == ".safetensors":
        tensors, metadata = _read_safetensors(data, path)
        name = path.stem
    elif suffix in IMAGE_SUFFIXES:
        content = _png_content(data, path)
        tensors, metadata = _read_dict(content, path)
        # Cards carry their own name, and webuis go by that one.
        given = content.get("name")
        name = given if isinstance(given, str) and given.isprintable() and given.strip() else path.stem
    else:
        raise EmbeddingFileError(f"{path} is no embedding file: they end in {', '.join(EMBEDDING_SUFFIXES)}.")
    return Embedding(name, plain_vectors(tensors, f"{path} can't be used"), metadata)


def _file_bytes(file: Path) -> bytes:
    try:
        about = file.stat()
        if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for, and a device may have no end
            raise EmbeddingFileError(f"{file} can't be read: it is no file. Check the path.")
        if about.st_size > MAX_FILE_BYTES:
            raise EmbeddingFileError(
                f"{file} has {about.st_size >> 20} MB, far too many for an embedding. Is it a checkpoint or a LoRA?"
            )
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        said = getattr(error, "strerror", None) or error
        raise EmbeddingFileError(f"{file} can't be read: {said}. Check the path.") from error
    if not data:
        raise EmbeddingFileError(f"{file} is empty. Save or download it again.")
    return data


def _torch_content(data: bytes, path: Path) -> Any:
    if not data.startswith(ZIP_START) and LEGACY_MAGIC not in data[:64]:
        raise _foreign(path, f"a {path.suffix} file of torch", f"it starts with {_start(data)}")
    # The first embeddings kept their vectors in a ParameterDict; torch 2.5 and later can be told that it is harmless.
    allow = getattr(torch.serialization, "safe_globals", None)
    try:
        if data.startswith(ZIP_START):
            data = containers.plain_zip(data)
        else:
            containers.check_legacy(data)
        with allow([torch.nn.ParameterDict]) if allow else nullcontext():
            return torch.serialization.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # bytes of unknown origin can raise anything in the parser
        asks = re.search(r"(?:GLOBAL|class|global) ([A-Za-z_]\w*\.[\w.]+)", str(error))
        if asks:
            found = f"it asks for {asks[1]}; a file that wants to run code is not read"
        else:
            found = "it is cut off or damaged"
        raise _foreign(path, f"a {path.suffix} file of torch", found) from error


def _read_safetensors(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        tensors = safetensors.torch.load(data)
        about = dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {})
    except Exception as error:  # as above
        found = f"it is cut off or damaged, and starts with {_start(data)}"
        raise _foreign(path, "a safetensors file", found) from error
    if len(tensors) != 1 and tensors.keys() != set(PAIR_KEYS):
        raise _foreign(path, "an embedding", f"it holds {listed(tensors)}")
    if len(tensors) == 1:
        tensors = {SINGLE_KEY: next(iter(tensors.values()))}
    record = _own_record(about)
    return tensors, about if record is None else record


def _read_dict(content: Any, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a `.pt`, a `.bin` or a card holds -> (tensors, metadata)."""
    if not isinstance(content, dict):
        raise _foreign(path, "an embedding", f"it holds a {type(content).__name__}")
    metadata = _own_record(content)
    if metadata is None:
        metadata = {key: content[key] for key in FOREIGN_KEYS if _is_plain(content.get(key))}
    if "string_to_param" in content:
        params = content["string_to_param"]
        params = getattr(params, "_parameters", params)  # where a ParameterDict of any age keeps them
        if not isinstance(params, dict) or len(params) != 1:
            found = listed(params) if isinstance(params, dict) else f"a {type(params).__name__}"
            raise _foreign(path, "an embedding", f"its string_to_param holds {found}")
        return {SINGLE_KEY: next(iter(params.values()))}, metadata
    if set(PAIR_KEYS) <= content.keys():
        return {key: content[key] for key in PAIR_KEYS}, metadata
    if len(content) == 1:  # diffusers: {"<token>": vectors}
        ((token, vectors),) = content.items()
        return {SINGLE_KEY: vectors}, {"token": shown(token)}
    raise _foreign(path, "an embedding", f"it holds {listed(content)}")


def _png_content(data: bytes, path: Path) -> dict[str, Any]:
    text = _png_text(data) if data.startswith(PNG_START) else None
    if text is None:
        raise EmbeddingFileError(
            f"{path} has no embedding in its text. If it is hidden in the pixels of the picture, it can't be read "
            "here: save the embedding as .pt or .safetensors in the webui that made it."
        )
    try:
        if len(text) > MAX_CARD_TEXT:
            raise ValueError("too long")
        content = json.loads(base64.b64decode(text), object_hook=_png_tensor)
    except Exception as error:  # as above
        raise _foreign(path, "a card with an embedding", "its text is cut off or damaged") from error
    if not isinstance(content, dict):
        raise _foreign(path, "a card with an embedding", f"its text holds a {type(content).__name__}")
    return content


def _png_text(data: bytes) -> bytes | None:
    """The text the webui puts into a card. Chunks of a PNG: length, kind, body, checksum."""
    position = len(PNG_START)
    for _ in range(MOST_CHUNKS):
        if position + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind == b"tEXt":
            keyword, _, text = data[position + 8 : position + 8 + length].partition(b"\0")
            if keyword == PNG_KEYWORD:
                return text
        position += 12 + length
    return None


def _png_tensor(content: dict[str, Any]) -> Any:
    if "TORCHTENSOR" in content:
        return torch.tensor(content["TORCHTENSOR"], dtype=torch.float32)
    return content


def _own_record(about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metadata as `save` wrote it. A record that another tool spoiled is no reason to refuse the vectors."""
    try:
        record = json.loads(about[RECORD_KEY], parse_constant=lambda _: None)
        json.dumps(record, indent=1)  # what nests deeply can be read, but not written again
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _is_plain(value: Any) -> bool:
    """Whether it is a text, or a number of a usual size."""
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < LARGEST_NUMBER)


def _foreign(path: Path, expected: str, found: str) -> EmbeddingFileError:
    return EmbeddingFileError(f"{path} can't be read as {expected}: {found}. The file was left as it is.")


def _start(data: bytes) -> str:
    return repr(data[:16])[1:]
