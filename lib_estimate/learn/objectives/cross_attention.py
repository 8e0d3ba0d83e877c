"""The cross-attention part: match the outputs of the layers through which the text comes, without the U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch
from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Session
from lib_estimate.learn.objectives.base import TINY, Distance, Objective, in_sentences
from lib_estimate.request import HOLE
from lib_estimate.target import sentences
from lib_estimate.target.queries import Queries
from lib_estimate.target.target import Target


class CrossAttention(Objective):
    """Match the outputs of the U-Net's cross-attention layers, for the queries met under the target:

        mean over layers l of d(A_l(q, z(E)), A_l(q, z*)) / d(A_l(q, z(empty)), A_l(q, z*))

    No U-Net runs: a step costs the text encoder and the layers themselves, over a few queries. The pooled vector, which
    SDXL adds to the timestep instead of attending to it, counts like the output of one more layer.
    """

    def __init__(self, session: Session, target: Target, queries: Queries, distance: Distance) -> None:
        if target.composed():
            raise RequestError(
                "The cross-attention part can't follow prompts composed with AND, which have an attention each, nor "
                "LoRAs. Use the unet part, which can."
            )
        self.session, self.target, self.distance = session, target, distance
        self.layers = session.cross_attention()
        self.hidden = [hidden.flatten(0, 1)[None] for hidden in queries.hidden]  # [1, M*Q, C]
        with torch.no_grad():
            self.wanted = [self._under_target(layer, hidden, queries) for layer, hidden in self._pairs(queries)]
            empty = [layer(h, target.empty.hidden) for layer, h in zip(self.layers, self.hidden, strict=True)]
            if target.empty.pooled is not None:
                empty.append(target.empty.pooled)
                self.wanted.append(torch.cat([target.wanted(s)[0][1].pooled for s in queries.step.unique().tolist()]))
        far = [distance(*_alike(e, w)).mean().clamp_min(TINY) for e, w in zip(empty, self.wanted, strict=True)]
        self.scales = [1 / f for f in far]

    def _pairs(self, queries: Queries):
        return zip(self.layers, queries.hidden, strict=True)

    def _under_target(self, layer, hidden: Tensor, queries: Queries) -> Tensor:
        """Outputs `[1, M*Q, C]` under each latent's own conditioning. hidden `[M, Q, C]`."""
        out = []
        for step in queries.step.unique_consecutive().tolist():
            at = (queries.step == step).to(hidden.device)
            (_, conditioning), *_ = self.target.wanted(step)
            out.append(layer(hidden[at].flatten(0, 1)[None], conditioning.hidden))
        return torch.cat(out, dim=1)

    def draw(self, generator: torch.Generator, fixed: bool) -> None:
        return None

    def losses(self, vectors: Vectors, drawn: None) -> Iterator[Tensor]:
        context = self.target.embed(self.session, vectors)
        out = [layer(hidden, context.hidden) for layer, hidden in zip(self.layers, self.hidden, strict=True)]
        out += [] if context.pooled is None else [context.pooled]
        terms = [
            self.distance(*_alike(given, wanted)).mean() * scale
            for given, wanted, scale in zip(out, self.wanted, self.scales, strict=True)
        ]
        yield torch.stack(terms).mean()


def _alike(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """One pooled vector `[1, P]` is held against those of all steps `[S, P]`; the rest is of one shape anyway."""
    return given.expand_as(wanted), wanted


class InSentences(Objective):
    """Match cross-attention outputs with the embedding alone and inside of random sentences at once.

    Per layer l and sentence s, with the queries of the stand-alone target used for all sentences:

        d(A(z_s(E)), A(z_s*)) / (d(A(z_s(plain)), A(z_s*)) + FLOOR d(A(z(empty)), A(z_s*))),  A(z) = A_l(q, z)

    so 1 means "as far off as without the weights" in every sentence, weak or strong. The stand-alone term counts ALONE
    times as much as a sentence. The pooled vector is one more layer; weights don't change it, so it has a floor of its
    own.
    """

    FLOOR, POOLED_FLOOR, ALONE, FRESH, FIXED = 0.001, 0.05, 6.0, 3, 24
    QUERIES = 96  # per layer and sentence

    def __init__(
        self, session: Session, target: Target, queries: Queries, distance: Distance, text: str, avoid: Sequence[str]
    ) -> None:
        if target.single() is None:
            raise RequestError(
                "A prompt that changes from step to step or has AND can't be learnt for use anywhere. Use --use whole."
            )
        self.session, self.target, self.distance, self.text = session, target, distance, text
        self.layers = session.cross_attention()
        self.hidden = [hidden.flatten(0, 1) for hidden in queries.hidden]  # [M*Q, C]
        self.avoid = set(avoid)

    def draw(self, generator: torch.Generator, fixed: bool) -> list[tuple]:
        """Sentences with all that doesn't depend on the vectors: one (frame texts, weights, per-layer data)."""
        seed = 0 if fixed else int(torch.randint(2**31, (1,), generator=generator))
        rng = Random(seed)
        count = self.FIXED if fixed else self.FRESH
        chosen = [HOLE, *sentences.distinct(rng, count, self.avoid, self.session.random_text)]
        return self.prepared(chosen, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def prepared(self, chosen: Sequence[str], generator: torch.Generator) -> list[tuple]:
        """For sentences, the embedding alone first: frames, weights `[S]`, and per layer queries, target and scale."""
        frames, wanted, plain = in_sentences(self.session, self.text, chosen)
        empty = self.target.empty.expand(len(chosen))
        weights = torch.ones(len(chosen), device=wanted.hidden.device)
        weights[0] = self.ALONE
        queries, data = [], []
        for layer, hidden in zip(self.layers, self.hidden, strict=True):
            at = torch.randperm(len(hidden), generator=generator)[: self.QUERIES].to(hidden.device)
            q = hidden[at][None].expand(len(chosen), -1, -1)
            queries.append(q)
            y = layer(q, wanted.hidden)
            data.append((y, self._scale(y, layer(q, plain.hidden), layer(q, empty.hidden), self.FLOOR)))
        if wanted.pooled is not None:
            y = wanted.pooled
            data.append((y, self._scale(y, plain.pooled, empty.pooled, self.POOLED_FLOOR)))
        return [frames, weights / weights.sum(), queries, data]

    def _scale(self, wanted: Tensor, plain: Tensor, empty: Tensor, floor: float) -> Tensor:
        """What makes a distance 1 that is as large as without weights, `[S]`."""
        return 1 / (self.distance(plain, wanted) + floor * self.distance(empty, wanted)).clamp_min(TINY)

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        yield (self.shares(vectors, drawn) * drawn[1]).sum()

    def shares(self, vectors: Vectors, drawn: list) -> Tensor:
        """Each sentence's own loss `[S]`, mean over the layers."""
        frames, _, queries, data = drawn
        context = self.session.encode(frames, vectors)
        out = [layer(q, context.hidden) for layer, q in zip(self.layers, queries, strict=True)]
        out += [] if context.pooled is None else [context.pooled]
        terms = [self.distance(given, y) * scale for given, (y, scale) in zip(out, data, strict=True)]
        return torch.stack(terms).mean(0)
