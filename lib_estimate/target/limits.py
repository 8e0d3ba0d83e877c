"""What no model can be told: weights beyond what half precision holds, more text than a word can stand for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import Conditioning, PromptPart, Session, Token

# CLIP's largest hidden states are some 30, and webuis run U-Nets in float16, which ends at 65504: about twice of this.
LARGEST_WEIGHT = 1000.0
MOST_CHUNKS = 64  # of cross-attention's context, which each takes time and memory in every layer
LONGEST_QUOTE = 60


def check_readable(session: Session, parts: Sequence[PromptPart], what: str) -> None:
    """Refuses a prompt, as the host reads it, before it is encoded. what: "prompt" or "negative prompt"."""
    for part in parts:
        texts = list(dict.fromkeys(text for _, text in part.texts))
        if abs(part.weight) > LARGEST_WEIGHT:
            raise RequestError(_too_heavy(texts[0], part.weight, what))
        for text in texts:
            chunks = session.tokens(text)
            if len(chunks) > MOST_CHUNKS:
                raise RequestError(
                    f"The {what} has {len(chunks)} chunks of {session.info.chunk_length} tokens, and {MOST_CHUNKS} is "
                    "the most: no word can stand for so much. Leave out what matters least."
                )
            piece, weight = heaviest(chunks)
            if abs(weight) > LARGEST_WEIGHT:
                raise RequestError(_too_heavy(piece, weight, what))


def check_finite(session: Session, parts: Sequence[PromptPart], made: Iterable[Conditioning], what: str) -> None:
    """Refuses what became of a prompt where the U-Net's number format can't hold it."""
    different = {id(each): each for each in made}.values()
    tensors = [tensor for each in different for tensor in (each.hidden, each.pooled) if tensor is not None]
    if all(torch.isfinite(tensor.to(session.info.dtype)).all() for tensor in tensors):
        return
    found = [heaviest(session.tokens(text)) for part in parts for _, text in part.texts]
    piece, weight = max(found, key=lambda pair: abs(pair[1]))
    raise RequestError(
        f"The text encoder makes numbers that are not finite of the {what}. Its largest weight is {weight:g}, of "
        f"{_quoted(piece)}: lower it, or take out an embedding that is named there. Or the checkpoint is damaged."
    )


def heaviest(chunks: Iterable[Iterable[Token]]) -> tuple[str, float]:
    """The words with the weight furthest from 0, and that weight."""
    runs = [(" ".join(token.text for token in run), weight) for weight, run in groupby(
        (token for chunk in chunks for token in chunk), key=lambda token: token.weight)]  # fmt: skip
    return max(runs, key=lambda run: abs(run[1]), default=("", 1.0))


def _too_heavy(piece: str, weight: float, what: str) -> str:
    return (
        f"In the {what} {_quoted(piece)} has the weight {weight:g}. Beyond {LARGEST_WEIGHT:g}, float16 can't hold what "
        "a weight makes of the text: write a smaller one, such as 1.3."
    )


def _quoted(piece: str) -> str:
    return f'"{piece.strip()[:LONGEST_QUOTE]}"'
