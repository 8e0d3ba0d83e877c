"""What an embedding is: named vectors with a record, as they lie in a file and as the rest of the program has them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lib_estimate.errors import EmbeddingFileError

Vectors = dict[str, torch.Tensor]
"""Text encoder -> `[N, width]`, float32. SD1 `clip_l`, SD2 `clip_h`, SDXL `clip_l` and `clip_g` with the same N."""

SINGLE_KEY = "clip_l"
"""What `load` calls the only tensor of a file: SD1 and SD2 files don't say which text encoder they are for."""

PAIR_KEYS = ("clip_l", "clip_g")
RECORD_KEY = "embedding_estimate"
MAX_FILE_BYTES = 512 << 20  # old diffusers files drag their whole token table along (150 MB); a checkpoint is larger
MAX_VECTOR_BYTES = 64 << 20  # some ten thousand vectors of the widest text encoder


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


def plain_vectors(tensors: Mapping[str, Any], what: str) -> Vectors:
    """Float32 clones on the CPU, `[N, width]` each (`[width]` is one vector), so that no large storage hangs on."""
    if len(tensors) != 1 and set(tensors) != set(PAIR_KEYS):
        raise EmbeddingFileError(f"{what}: expected one tensor, or clip_l and clip_g, but found {listed(tensors)}.")
    keys = PAIR_KEYS if len(tensors) > 1 else tensors  # a safetensors file has an order of its own
    vectors = {key: _plain_tensor(tensors[key], f"{what}: {shown(key)}") for key in keys}
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
    # Some kinds of tensors know neither their shape nor how to become numbers.
    with suppress(RuntimeError, NotImplementedError, TypeError, AttributeError):
        return _finite(tensor, what)
    raise EmbeddingFileError(f"{what} is a tensor of a kind that holds no plain vectors. This is no embedding.")


def _finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    usable = tensor.is_floating_point() and tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)
    # A few bytes in a file can claim to be repeated into a tensor that fills the memory.
    if not usable or tensor.ndim not in (1, 2) or tensor.numel() * 4 > MAX_VECTOR_BYTES:
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


def listed(content: Mapping[Any, Any]) -> str:
    names = ", ".join(sorted(map(shown, content))[:4])  # safetensors gives no order
    return f"{len(content)} entries ({names}{', ...' if len(content) > 4 else ''})" if content else "nothing"


def shown(key: Any) -> str:
    """A key of a file as a sentence can quote it."""
    if not isinstance(key, str):
        return type(key).__name__
    plain = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in key[:61])
    return plain if len(plain) <= 60 else f"{plain[:60]}..."
