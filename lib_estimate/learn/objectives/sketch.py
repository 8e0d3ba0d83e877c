"""A sketch of the U-Net: what the cross-attention outputs do to the predicted noise, without running it.

Near the prompt eps(E) - eps* is the sum over layers l of J_l (A_l(E) - A_l*). J is far too large to know, but for a
Gaussian probe v the product J_l^T v is one gradient, g_l, and the mean of <v, J dA>^2 over probes is |J dA|^2
(Hutchinson 1990). Squared position by position, one probe a latent is enough: the sum over all positions squared has
the same mean, but is the square of one random number. So no U-Net runs while learning.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Sensitivity, Session
from lib_estimate.learn.objectives.base import TINY, Objective, in_sentences
from lib_estimate.request import HOLE
from lib_estimate.target import sentences
from lib_estimate.target.target import Target

MOST_CELLS = 0.25  # of a latent's cells: more cost memory and time at every step, and hardly teach more


@dataclass(frozen=True)
class Layer:
    """One cross-attention layer at the kept cells: hidden and gradient `[M, cells * side * side, C]`, cell by cell."""

    hidden: Tensor
    gradient: Tensor
    side: int


@dataclass(frozen=True)
class Sketched:
    """What was recorded of M latents: the layers, the pooled vector's gradient `[M, P]` or None, and the conditioning
    of each, at which its gradients were taken."""

    layers: list[Layer]
    pooled: Tensor | None
    given: list[Conditioning]

    def finest(self) -> int:
        """Positions that a cell has on each side in the finest layers."""
        return max(layer.side for layer in self.layers)


def sketched(
    session: Session, given: Sequence[Conditioning], x: Tensor, timestep: Tensor, budget: float, seed: int
) -> Iterator[int | Sketched]:
    """Records the sensitivity of latents x `[M, c, h, w]` at `timestep` `[M]`, each under its conditioning.

    It costs a forward and a backward each.

    Yields the number of each latent done, and last the Sketched. Keeps as many cells as fit into `budget` bytes; a cell
    is a position of the coarsest layer with all the finer ones' inside of it, so that every layer sees the same places.
    """
    generator = torch.Generator().manual_seed(seed)
    pieces: list[list[Layer]] = []
    pooled: list[Tensor] = []
    for index, conditioning in enumerate(given):
        at = slice(index, index + 1)
        probe = torch.randn(x[at].shape, generator=generator).to(x.device)
        seen = _sensitivity(session, x[at], timestep[at], conditioning, probe)
        pieces.append(_cells(seen, x.shape[-2:], budget / len(given), generator))
        pooled += [] if seen.pooled is None else [seen.pooled]
        yield index + 1
    yield Sketched(_joined(pieces), torch.cat(pooled) if pooled else None, list(given))


def _joined(pieces: list[list[Layer]]) -> list[Layer]:
    """The latents of each layer together. Takes the pieces apart, so that no more than a layer is there twice."""
    columns = [list(column) for column in zip(*pieces, strict=True)]
    pieces.clear()
    layers = []
    while columns:
        each = columns.pop(0)
        layers.append(Layer(torch.cat([p.hidden for p in each]), torch.cat([p.gradient for p in each]), each[0].side))
    return layers


def _sensitivity(session: Session, *given: Any) -> Sensitivity:
    """Of one latent. Where memory is short, activations are computed again from then on."""
    try:
        return session.sensitivity(*given)
    except torch.cuda.OutOfMemoryError:
        if not session.save_memory():
            raise
    torch.cuda.empty_cache()
    return session.sensitivity(*given)


def _cells(seen: Sensitivity, size: Sequence[int], budget: float, generator: torch.Generator) -> list[Layer]:
    """One latent's layers at random cells, the same of each layer. size: (h, w) of the latent."""
    factors = [round(math.sqrt(size[0] * size[1] / hidden.shape[1])) for hidden in seen.hidden]
    coarsest = max(factors)
    rows, columns = (-(-side // coarsest) for side in size)
    whole = sum(hidden.nbytes + gradient.nbytes for hidden, gradient in zip(seen.hidden, seen.gradient, strict=True))
    kept = max(1, int(rows * columns * min(MOST_CELLS, budget / whole)))
    cell = torch.randperm(rows * columns, generator=generator)[:kept]
    out = []
    for hidden, gradient, factor in zip(seen.hidden, seen.gradient, factors, strict=True):
        side, width = coarsest // factor, -(-size[1] // factor)
        inside = torch.arange(side)
        row, column = (cell // columns * side)[:, None] + inside, (cell % columns * side)[:, None] + inside
        # Where the last cells reach over the edge of the picture, its last row or column stands in.
        row, column = row.clamp(max=hidden.shape[1] // width - 1), column.clamp(max=width - 1)
        at = (row[:, :, None] * width + column[:, None, :]).flatten().to(hidden.device)
        out.append(Layer(hidden[:, at].clone(), gradient[:, at].clone(), side))
    return out


class Sketch(Objective):
    """Match the predicted noise as far as its sketch tells:

        sum over latents m, positions p of e_mp(E)^2 / the same of the empty prompt,
        e_mp(E) = sum over layers l of <g_lmp, A_l(q_mp, z(E)) - A_l(q_mp, z*)>

    p are the positions of the finest layers; a coarser layer's is shared out among those it covers. The pooled vector,
    which acts everywhere at once, is a position of its own.
    """

    def __init__(self, session: Session, target: Target, recorded: Sketched) -> None:
        self.session, self.target, self.recorded = session, target, recorded
        self.calls = session.cross_attention()
        with torch.no_grad():
            self.wanted = self._under_target()
            self.scale = 1 / self._far(target.empty).clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> None:
        return None

    def losses(self, vectors: Vectors, drawn: None) -> Iterator[Tensor]:
        yield self._far(self.target.embed(self.session, vectors)) * self.scale

    def _far(self, given: Conditioning) -> Tensor:
        return torch.stack([(e - w).square().sum() for e, w in zip(self._sums(given), self.wanted, strict=True)]).sum()

    def _under_target(self) -> list[Tensor]:
        """The sums of each latent under its own conditioning."""
        given = self.recorded.given
        known = {key: self._sums(each) for key, each in {id(each): each for each in given}.items()}
        rows = [[piece[index] for piece in known[id(each)]] for index, each in enumerate(given)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def _sums(self, given: Conditioning) -> list[Tensor]:
        """sum over layers of <g, A> `[M, cells, n, n]`, n positions a side, and `[M]` of the pooled vector."""
        finest, total = self.recorded.finest(), []
        for call, layer in zip(self.calls, self.recorded.layers, strict=True):
            out = call(layer.hidden.flatten(0, 1)[None], given.hidden).view(layer.hidden.shape)
            e = (out * layer.gradient.float()).sum(-1).unflatten(1, (-1, layer.side, layer.side))
            covers = finest // layer.side
            total.append(e.repeat_interleave(covers, 2).repeat_interleave(covers, 3) / covers**2)
        pooled = self.recorded.pooled
        return [torch.stack(total).sum(0), *([] if pooled is None else [(pooled.float() * given.pooled).sum(-1)])]


class SketchInSentences(Objective):
    """Match the predicted noise, as far as its sketch tells, with the embedding alone and inside of random sentences:

        sum_lp e_lps(E)^2 / (sum_lp e_lps(plain)^2 + FLOOR sum_lp e_lps(empty)^2)

    per sentence s, e against the sentence's own target, at random positions p of all recorded latents. So 1 means "as
    far off as without the weights" in every sentence, weak or strong. The prompt alone counts ALONE times as much.
    Squared layer by layer: what they add up to holds under the conditioning they were recorded under, not elsewhere.
    Each latent counts by its share of what the weights change there, alone: else the lowest noise levels, where eps
    differs most and moves the picture least, would be all that is learnt.
    """

    FLOOR, ALONE, FRESH, FIXED, POSITIONS = 0.003, 6.0, 3, 24, 128
    LEVEL_FLOOR, LEVEL_POINTS = 0.02, 64  # of the latents' mean; positions of each that tell its level

    def __init__(self, session: Session, target: Target, recorded: Sketched, text: str, avoid: Sequence[str]) -> None:
        self.session, self.target, self.text, self.avoid = session, target, text, set(avoid)
        self.calls, self.recorded = session.cross_attention(), recorded
        count, positions = recorded.layers[0].hidden.shape[:2]
        self.points = count * positions // recorded.layers[0].side ** 2 * recorded.finest() ** 2
        self.levels = self._levels(count)

    def draw(self, generator: torch.Generator, fixed: bool) -> list:
        seed = 0 if fixed else int(torch.randint(2**31, (1,), generator=generator))
        chosen = sentences.distinct(
            Random(seed), self.FIXED if fixed else self.FRESH, self.avoid, self.session.random_text
        )
        return self.prepared([HOLE, *chosen], torch.Generator().manual_seed(seed), self.POSITIONS)

    @torch.no_grad()
    def prepared(self, chosen: Sequence[str], generator: torch.Generator, positions: int) -> list:
        """For sentences, the embedding alone first: frames, weights `[S]`, rows, what is wanted, and scales `[S]`."""
        frames, wanted, plain = in_sentences(self.session, self.text, chosen)
        point = torch.randint(self.points, (positions,), generator=generator)
        rows = [self._rows(layer, point, self.levels) for layer in self.recorded.layers]
        y = self._sums(rows, wanted)
        off, far = (self._far(rows, given, y) for given in (plain, self.target.empty))  # one empty prompt for all
        weights = torch.ones(len(chosen), device=y[0].device)
        weights[0] = self.ALONE
        return [frames, weights / weights.sum(), rows, y, 1 / (off + self.FLOOR * far).clamp_min(TINY)]

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        yield (self.shares(vectors, drawn) * drawn[1]).sum()

    def shares(self, vectors: Vectors, drawn: list) -> Tensor:
        """Each sentence's own loss `[S]`."""
        frames, _, rows, wanted, scales = drawn
        return self._far(rows, self.session.encode(frames, vectors), wanted) * scales

    @torch.no_grad()
    def _levels(self, count: int) -> Tensor:
        """What each latent's gradients are multiplied with, `[M]`: one over the root of what the weights change."""
        _, wanted, plain = in_sentences(self.session, self.text, [HOLE])
        own = self.points // count
        some = torch.linspace(0, own - 1, min(own, self.LEVEL_POINTS)).round().long()
        every, same = (torch.arange(count)[:, None] * own + some).flatten(), torch.ones(count)
        total = torch.zeros(count)
        for call, layer in zip(self.calls, self.recorded.layers, strict=True):
            hidden, gradient = self._rows(layer, every, same)
            y, off, far = (
                (call(hidden[None], given.hidden)[0] * gradient).sum(-1) for given in (wanted, plain, self.target.empty)
            )
            changed = (off - y).square() + self.FLOOR * (far - y).square()
            total += changed.view(count, -1).mean(1).cpu()
        total += self.LEVEL_FLOOR * total.mean()
        return (total.mean() / total.clamp_min(TINY)).sqrt()

    def _rows(self, layer: Layer, point: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden and gradient `[P, C]` where points of the finest grid lie in a layer; point counts cell by cell.

        A position of a coarse layer is met as often as it covers points, and weighs less by that.
        """
        finest = self.recorded.finest()
        cell, y, x = point // finest**2, point // finest % finest, point % finest
        covers = finest // layer.side
        at = ((cell * layer.side + y // covers) * layer.side + x // covers).to(layer.hidden.device)
        hidden, gradient = (rows.flatten(0, 1)[at] for rows in (layer.hidden, layer.gradient))
        latent = point // (self.points // len(levels))
        return hidden, gradient.float() * (levels[latent] / covers).to(gradient.device)[:, None]

    def _far(self, rows: list[tuple[Tensor, Tensor]], given: Conditioning, wanted: list[Tensor]) -> Tensor:
        """Mean square over positions, and that of the pooled vector's part, `[S]`."""
        return torch.stack(
            [(e - y).square().mean(1) for e, y in zip(self._sums(rows, given), wanted, strict=True)]
        ).sum(0)

    def _sums(self, rows: list[tuple[Tensor, Tensor]], given: Conditioning) -> list[Tensor]:
        """<g, A> of each layer, `[S, P]` under S conditionings, and `[S, M]` of the pooled vector."""
        sums = []
        for call, (hidden, gradient) in zip(self.calls, rows, strict=True):
            out = call(hidden[None].expand(len(given), -1, -1), given.hidden)
            sums.append((out * gradient).sum(-1))
        pooled = self.recorded.pooled
        if pooled is not None:
            spread = self.points / len(pooled)  # positions a latent has: the pooled vector's part is one for all
            sums.append(given.pooled @ (pooled.float() * self.levels.to(pooled.device)[:, None]).T / spread**0.5)
        return sums
