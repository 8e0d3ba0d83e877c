"""What is inside of an embedding: how long its vectors are beside a model's words, and which words they are near."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Words

NEAREST = 4  # words named for a vector
RARE = 0.001  # share of the words that are shorter, and of those that are longer, than what counts as usual
FAR = 2.0  # times as long as the longest, or as short as the shortest, of the usual words
AT_ONCE = 4096  # rows of a table that are made float32 at a time


@dataclass(frozen=True)
class Inside:
    """One vector: its length, and its nearest words with their cosines, the nearest first. `far`: its length is far
    outside of what words have."""

    length: float
    words: tuple[tuple[str, float], ...] = ()
    far: bool = False


@dataclass(frozen=True)
class Look:
    """An embedding's vectors for one text encoder, beside its words. Without a model, nothing is known of words."""

    width: int
    vectors: tuple[Inside, ...]
    typical: float | None = None  # median length of a word
    usual: tuple[float, float] | None = None  # lengths between which all but the rarest words are

    def record(self) -> dict[str, Any]:
        """As plain values."""
        mean = sum(v.length for v in self.vectors) / len(self.vectors)
        about = {"vectors": len(self.vectors), "width": self.width, "length": mean}
        return about | {"typical": self.typical, "usual": self.usual, "rows": [asdict(v) for v in self.vectors]}

    def warnings(self) -> list[str]:
        """Sentences about vectors that are far outside of what words are."""
        far = {number: v.length / self.typical for number, v in enumerate(self.vectors, 1) if v.far}
        if not far:
            return []
        every = len(far) == len(self.vectors) > 1
        numbers = f"vector{'s' if len(far) > 1 else ''} {', '.join(map(str, far))}"
        which = f"all {len(far)} vectors" if every else numbers
        times = dict.fromkeys(f"{share:.2g}" for share in (min(far.values()), max(far.values())))
        low, high = self.usual
        return [
            f"Far outside what words are: {which}; {' to '.join(times)} times as long as a typical word. Of a thousand "
            f"words all but two are between {low:.3g} and {high:.3g} long; what is under half or over twice that is "
            "told here. Such an embedding may do well as a whole prompt and badly beside other words."
        ]


def lengths(vectors: Vectors) -> dict[str, Look]:
    """What the vectors tell by themselves, without a model."""
    return {key: Look(rows.shape[1], tuple(map(Inside, rows.norm(dim=1).tolist()))) for key, rows in vectors.items()}


def look_inside(vectors: Vectors, words: Words, count: int = NEAREST) -> dict[str, Look]:
    """The vectors `{encoder: [N, width]}` beside the words of a model of these widths."""
    return {key: _look(rows, words.tables[key], words, count) for key, rows in vectors.items()}


@torch.no_grad()
def _look(rows: Tensor, table: Tensor, words: Words, count: int) -> Look:
    rows = rows.to(table.device).float()
    known = torch.cat([part.float().norm(dim=1) for part in table.split(AT_ONCE)])
    low, typical, high = torch.quantile(known, known.new_tensor([RARE, 0.5, 1 - RARE])).tolist()
    return Look(
        width=rows.shape[1],
        vectors=tuple(
            Inside(length, near, not low / FAR <= length <= high * FAR)
            for length, near in zip(rows.norm(dim=1).tolist(), nearest_words(rows, table, words, count), strict=True)
        ),
        typical=typical,
        usual=(low, high),
    )


def nearest_words(rows: Tensor, table: Tensor, words: Words, count: int) -> list[tuple[tuple[str, float], ...]]:
    """Of each row `[N, width]` the `count` words of the table `[V, width]` with the largest cosine; none for zeros.

    A word is in the table twice, alone and as the beginning of a longer one: that is one word here.
    """
    directions = normalize(rows, dim=1)
    cosine = torch.cat([directions @ normalize(part.float(), dim=1).T for part in table.split(AT_ONCE)], dim=1)
    values, tokens = cosine.topk(min(4 * count, len(table)), dim=1)
    out = []
    for row, cosines, found in zip(rows, values.tolist(), tokens.tolist(), strict=True):
        named: dict[str, float] = {}
        for token, value in zip(found, cosines, strict=True):
            named.setdefault(words.spelled(token) or f"token {token}", value)
        out.append(tuple(named.items())[:count] if row.any() else ())
    return out
