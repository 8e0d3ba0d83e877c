"""Names and files of embeddings: what may be a name, writing that never leaves half a file, reading without trust.

Two formats are written. Each is the one that every reader we know takes (AUTOMATIC1111 1.6 - 1.10, Forge, reForge,
ComfyUI, diffusers):

    .pt           AUTOMATIC1111's dict, in torch's older, non-zip container: the webui's check of pickles refuses the
                  members that a recent torch puts into the zip one. SD1 and SD2 only, because the webui takes every
                  key of an SDXL `.pt` for a tensor and would leave no room for the record.
    .safetensors  one tensor `emb_params` for SD1 and SD2 (the webui refuses a second), `clip_l` and `clip_g` for SDXL;
                  everything else stands in the header as text.

Read are these two, `.bin`, both containers of torch, and the PNG cards of AUTOMATIC1111.

Files are read into memory first and parsed there. Forge wraps `torch.load` and `safetensors.torch.load_file` so that a
failure renames the file whose path was among the arguments, and AUTOMATIC1111 wraps `torch.load` with a check that can
only open paths. `torch.serialization.load` and `safetensors.torch.load` are the same functions, unwrapped.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import re
import secrets
import struct
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lib_estimate.errors import EmbeddingFileError

Vectors = dict[str, torch.Tensor]
"""Text encoder -> `[N, width]`, float32. SD1 `clip_l`, SD2 `clip_h`, SDXL `clip_l` and `clip_g` with the same N."""

FORMATS = ("pt", "safetensors")

SINGLE_KEY = "clip_l"
"""What `load` calls the only tensor of a file: SD1 and SD2 files don't say which text encoder they are for."""

PAIR_KEYS = ("clip_l", "clip_g")
RECORD_KEY = "embedding_estimate"
FOREIGN_KEYS = ("name", "step", "sd_checkpoint", "sd_checkpoint_name")

MAX_NAME_BYTES = 128  # with ".safetensors" or ".preview.png" still below the 143 of an encrypted Linux home
MAX_FILE_BYTES = 512 << 20  # old diffusers files drag their whole token table along (150 MB); a checkpoint is larger

TORCH_SUFFIXES = (".pt", ".bin")
IMAGE_SUFFIXES = (".png", ".webp", ".jxl", ".avif")
EMBEDDING_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", *IMAGE_SUFFIXES)

# Only the start of what the two containers of torch look like; what follows is for torch to judge.
ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_KEYWORD = b"sd-ti-embedding"

FORBIDDEN_BY_FILES = '<>:"/\\|?*'
FORBIDDEN_BY_PROMPTS = ",()[]#"  # `:`, `<`, `|` and the backslash are refused by file systems already
PROMPT_WORDS = re.compile(r"\b(AND|BREAK)\b")
DEVICE_NAME = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9¹²³]) *(\..*)?", re.IGNORECASE)
INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # Unicode categories


@dataclass(frozen=True, eq=False)
class Embedding:
    """An embedding as it lies in a file.

    `name` is the file's stem, which is what webuis go by. `metadata` is anything JSON can hold (prompts, settings,
    seed, checkpoint, errors); its `step`, `sd_checkpoint` (short hash) and `sd_checkpoint_name`, if there, are also
    written where webuis look for them.
    """

    name: str
    vectors: Vectors
    metadata: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# Names


def check_name(name: str) -> str:
    """Returns the name without surrounding space and in composed Unicode, or says why it can't be used."""
    name = unicodedata.normalize("NFC", name).strip()
    if not name:
        raise EmbeddingFileError("The embedding has no name. Type one: it will be the word that stands in prompts.")
    for problem in (_file_problem(name), _prompt_problem(name)):
        if problem:
            shown = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name)
            raise EmbeddingFileError(f'"{shown}" can\'t be the name of an embedding: {problem}')
    return name


def _file_problem(name: str) -> str | None:
    """What Windows, Linux or a webui's look at its folder would make of a file of this name."""
    bad = sorted(set(name) & set(FORBIDDEN_BY_FILES))
    if bad:
        return f"file names can't contain {' '.join(bad)}. Leave that out."
    if any(unicodedata.category(character) in INVISIBLE for character in name):
        return "it contains an invisible character. Type the name instead of pasting it."
    if name.startswith("."):
        return "a file that starts with a dot is hidden. Start with a letter or a digit."
    if name.endswith("."):
        return "Windows drops a dot at the end. Leave it out."
    if DEVICE_NAME.fullmatch(name):
        return "Windows keeps it for a device. Add something to it."
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"it takes {len(name.encode())} bytes, and {MAX_NAME_BYTES} is the most. Choose a shorter one."
    ending = Path(name).suffix.lower()
    if ending == ".preview":
        return 'webuis keep files with ".preview" for the card pictures of embeddings. Leave that ending out.'
    if ending in EMBEDDING_SUFFIXES:
        return f'leave the ending "{ending}" out. The format is chosen apart from the name.'
    return None


def _prompt_problem(name: str) -> str | None:
    """What a webui's prompt parser would do to the name before the name could be found."""
    eaten = sorted(set(name) & set(FORBIDDEN_BY_PROMPTS))
    if eaten:
        return f"{' '.join(eaten)} means something in a prompt, so the name wouldn't be found there. Leave that out."
    word = PROMPT_WORDS.search(name)
    if word:
        return f"{word[0]} is a command in a prompt, so the name wouldn't be found there. Write it in small letters."
    return None


def shadowed_word(name: str, encode: Callable[[str], list[int]], common_below: int = 48_000) -> str | None:
    """A warning if the name is a word that prompts use, else None.

    Webuis look for embeddings among token ids, whatever the case, so an embedding called `cat` stands in wherever
    "cat" is written. `encode` gives a text's ids without start and end. CLIP's vocabulary numbers its pieces in the
    order in which they were merged, the most frequent first, and a text of one token is always a whole word of it. The
    first 48 000 of its 49 408 entries are common by that measure ("cat" is 2368, "kimono" 40 000 or so); the words
    people take on purpose because they mean nothing lie behind ("sks" is 48136).
    """
    ids = encode(name)
    if len(ids) != 1 or ids[0] >= common_below:
        return None
    return (
        f'"{name}" is a word of its own to the model: wherever a prompt says "{name}", in any case, this embedding '
        f'would take its place. Choose a name that isn\'t a word, such as "{name}_emb".'
    )


def embedding_path(folder: Path, name: str, file_format: str) -> Path:
    """Where an embedding of this name and format belongs. Checks both."""
    if file_format not in FORMATS:
        raise EmbeddingFileError(f'There is no format "{file_format}". Choose one of: {", ".join(FORMATS)}.')
    return Path(folder) / f"{check_name(name)}.{file_format}"


def find_existing(folder: Path, name: str) -> Path | None:
    """The file in the folder, or below it, that a webui may take for an embedding of this name; None if there is none.

    Case doesn't count: to Windows it makes no difference, and neither does it to the tokens webuis match names by.
    """
    wanted = _folded(name)
    for path in _files_below(Path(folder)):
        if path.suffix.lower() in EMBEDDING_SUFFIXES and _folded(path.stem) == wanted:
            return path
    return None


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip().casefold()


def _files_below(folder: Path) -> Iterator[Path]:
    """Files, nearest first within each folder; through links too, as webuis look, but through each only once."""
    seen: set[str] = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(root)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()
        for file in sorted(files):
            yield Path(root, file)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


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
        _plain_vectors(embedding.vectors, f'The embedding "{embedding.name}" was not saved'),
        _plain_json(embedding.metadata, "metadata"),
    )
    data = _pt_bytes(plain) if path.suffix.lower() == ".pt" else _safetensors_bytes(plain)
    if not overwrite and os.path.lexists(path):  # before any work on the disk; _publish makes it certain
        raise _taken(path)
    _write(plain, data, path, overwrite)


def _write(plain: Embedding, data: bytes, path: Path, overwrite: bool) -> None:
    # The ending keeps webuis from reading the file while it grows; the short name fits wherever the final one does.
    temporary = path.with_name(f".embedding-estimate-{secrets.token_hex(8)}.tmp")
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
        if _same(plain, _read(temporary, path)):
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
        pass  # no hard links on this file system (exFAT, some network drives): claim the name with an empty file
    try:
        open(path, "xb").close()
    except FileExistsError:
        raise _taken(path) from None
    try:
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


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


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def load(path: Path) -> Embedding:
    """Reads an embedding file, ours or anyone's. The file is never changed, renamed or moved, and no code in it runs.

    Vectors are float32 `[N, width]`. A file with one tensor gives the key "clip_l" for want of a better one: a caller
    who knows the model renames it. Metadata is our record if there is one, else what the file says about itself.
    """
    return _read(Path(path), Path(path))


def _read(file: Path, path: Path) -> Embedding:
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
        name = content["name"] if isinstance(content.get("name"), str) else path.stem
    else:
        raise EmbeddingFileError(f"{path} is no embedding file: they end in {', '.join(EMBEDDING_SUFFIXES)}.")
    return Embedding(name, _plain_vectors(tensors, f"{path} can't be used"), metadata)


def _file_bytes(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise EmbeddingFileError(
                f"{file} has {size >> 20} MB, far too many for an embedding. Is it a checkpoint or a LoRA?"
            )
        data = file.read_bytes()
    except OSError as error:
        raise EmbeddingFileError(f"{file} can't be read: {error.strerror or error}. Check the path.") from error
    if not data:
        raise EmbeddingFileError(f"{file} is empty. Save or download it again.")
    return data


def _torch_content(data: bytes, path: Path) -> Any:
    if not data.startswith(ZIP_START) and LEGACY_MAGIC not in data[:64]:
        raise _foreign(path, f"a {path.suffix} file of torch", f"it starts with {_start(data)}")
    # The first embeddings kept their vectors in a ParameterDict; torch 2.5 and later can be told that it is harmless.
    allow = getattr(torch.serialization, "safe_globals", None)
    try:
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
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except Exception as error:  # as above
        found = f"it is cut off or damaged, and starts with {_start(data)}"
        raise _foreign(path, "a safetensors file", found) from error
    about = header.get("__metadata__", {})
    if len(tensors) != 1 and tensors.keys() != set(PAIR_KEYS):
        raise _foreign(path, "an embedding", f"it holds {_listed(tensors)}")
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
        metadata = {key: content[key] for key in FOREIGN_KEYS if isinstance(content.get(key), str | int)}
    if "string_to_param" in content:
        params = content["string_to_param"]
        params = getattr(params, "_parameters", params)  # where a ParameterDict of any age keeps them
        if not isinstance(params, dict) or len(params) != 1:
            found = _listed(params) if isinstance(params, dict) else f"a {type(params).__name__}"
            raise _foreign(path, "an embedding", f"its string_to_param holds {found}")
        return {SINGLE_KEY: next(iter(params.values()))}, metadata
    if set(PAIR_KEYS) <= content.keys():
        return {key: content[key] for key in PAIR_KEYS}, metadata
    if len(content) == 1:  # diffusers: {"<token>": vectors}
        ((token, vectors),) = content.items()
        return {SINGLE_KEY: vectors}, {"token": str(token)}
    raise _foreign(path, "an embedding", f"it holds {_listed(content)}")


def _png_content(data: bytes, path: Path) -> dict[str, Any]:
    text = _png_text(data) if data.startswith(PNG_START) else None
    if text is None:
        raise EmbeddingFileError(
            f"{path} has no embedding in its text. If it is hidden in the pixels of the picture, it can't be read "
            "here: save the embedding as .pt or .safetensors in the webui that made it."
        )
    try:
        content = json.loads(base64.b64decode(text), object_hook=_png_tensor)
    except Exception as error:  # as above
        raise _foreign(path, "a card with an embedding", "its text is cut off or damaged") from error
    if not isinstance(content, dict):
        raise _foreign(path, "a card with an embedding", f"its text holds a {type(content).__name__}")
    return content


def _png_text(data: bytes) -> bytes | None:
    """The text the webui puts into a card. Chunks of a PNG: length, kind, body, checksum."""
    position = len(PNG_START)
    while position + 8 <= len(data):
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
        record = json.loads(about[RECORD_KEY])
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


# ---------------------------------------------------------------------------------------------------------------------
# Both ways


def _plain_vectors(tensors: Mapping[str, Any], what: str) -> Vectors:
    """Float32 clones on the CPU, `[N, width]` each (`[width]` is one vector), so that no large storage hangs on."""
    if len(tensors) != 1 and set(tensors) != set(PAIR_KEYS):
        raise EmbeddingFileError(f"{what}: expected one tensor, or clip_l and clip_g, but found {_listed(tensors)}.")
    keys = PAIR_KEYS if len(tensors) > 1 else tensors  # a safetensors file has an order of its own
    vectors = {key: _plain_tensor(tensors[key], f"{what}: {key}") for key in keys}
    lengths = {len(tensor) for tensor in vectors.values()}
    if len(lengths) != 1:
        raise EmbeddingFileError(
            f"{what}: clip_l has {len(vectors['clip_l'])} vectors and clip_g {len(vectors['clip_g'])}. "
            "SDXL needs as many of one as of the other."
        )
    return vectors


def _plain_tensor(tensor: Any, what: str) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise EmbeddingFileError(f"{what} is a {type(tensor).__name__}, not a tensor. This is no embedding.")
    usable = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    # A few bytes in a file can claim to be repeated into a tensor that fills the memory.
    if not usable or tensor.ndim not in (1, 2) or tensor.numel() * 4 > MAX_FILE_BYTES:
        raise EmbeddingFileError(
            f"{what} is {tensor.dtype} {list(tensor.shape)}. An embedding holds floating-point vectors [N, width]."
        )
    plain = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    plain = plain.unsqueeze(0) if plain.ndim == 1 else plain
    if plain.numel() == 0:
        raise EmbeddingFileError(f"{what} is {list(plain.shape)}: no vectors. An embedding has at least one.")
    if not torch.isfinite(plain).all():
        raise EmbeddingFileError(
            f"{what} contains NaN or infinity, which turn every picture black. Make the embedding again, with a lower "
            "learning rate or in full precision."
        )
    return plain


def _foreign(path: Path, expected: str, found: str) -> EmbeddingFileError:
    return EmbeddingFileError(f"{path} can't be read as {expected}: {found}. The file was left as it is.")


def _start(data: bytes) -> str:
    return repr(data[:16])[1:]


def _listed(content: Mapping[Any, Any]) -> str:
    names = ", ".join(sorted(map(str, content))[:4])  # safetensors gives no order
    return f"{len(content)} entries ({names}{', ...' if len(content) > 4 else ''})" if content else "nothing"
