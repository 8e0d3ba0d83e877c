"""What is made to match: the objectives. Each maps vectors to one scalar loss by the same call.

A loss is divided by the same loss of the empty prompt, so 1 means "as far away as an empty prompt" and 0 a perfect
match, whatever the model, the distance measure and the objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from lib_estimate import sentences
from lib_estimate.embedding_file import Vectors
from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import Conditioning, Session
from lib_estimate.queries import Queries
from lib_estimate.request import HOLE
from lib_estimate.target import Bank, Target, noise_under

Distance = Callable[[Tensor, Tensor], Tensor]  # (prediction [B, ...], target [B, ...]) -> [B], float32
TINY = 1e-12


class Objective(ABC):
    """Something to minimise over vectors."""

    @abstractmethod
    def draw(self, generator: torch.Generator, fixed: bool) -> Any:
        """What the next step learns from; `fixed` gives the same spread-out choice every time."""

    @abstractmethod
    def losses(self, vectors: Vectors, drawn: Any) -> Iterator[Tensor]:
        """Scalars float32 whose sum is the loss, each with a gradient to every tensor in `vectors`.

        Whoever takes each one's gradient before asking for the next holds only one's activations in memory.
        """

    def loss(self, vectors: Vectors, drawn: Any) -> Tensor:
        """The loss as one scalar."""
        return torch.stack(list(self.losses(vectors, drawn))).sum()

    def lighten(self) -> bool:
        """Makes what follows need less memory and more time; False where there is no way left."""
        return False


class HiddenState(Objective):
    """Match the text encoder's hidden states at all positions: d(z(E), z*) / d(z(empty), z*).

    The positions after the embedding count too: the U-Net attends to padding as well. Where the model takes a pooled
    vector, it is half of the loss.
    """

    def __init__(self, session: Session, target: Target, distance: Distance) -> None:
        wanted = target.single()
        if wanted is None:
            raise RequestError(
                "The transformer part can't follow a prompt that changes from step to step or is composed with AND. "
                "Use the unet part, which can."
            )
        if wanted.hidden.shape[1] != target.empty.hidden.shape[1]:
            raise RequestError(
                f"The prompt is longer than one chunk of {session.info.chunk_length} tokens, and the transformer part "
                "compares one chunk. Use the unet part, or shorten the prompt."
            )
        self.session, self.target, self.wanted, self.distance = session, target, _tensors(wanted), distance
        pairs = zip(_tensors(target.empty), self.wanted, strict=True)
        self.scales = [1 / distance(empty, z).mean().clamp_min(TINY) for empty, z in pairs]

    def draw(self, generator: torch.Generator, fixed: bool) -> None:
        return None

    def losses(self, vectors: Vectors, drawn: None) -> Iterator[Tensor]:
        given = _tensors(self.target.embed(self.session, vectors))
        terms = [
            self.distance(z, wanted).mean() * scale
            for z, wanted, scale in zip(given, self.wanted, self.scales, strict=True)
        ]
        yield torch.stack(terms).mean()


def _tensors(conditioning: Conditioning) -> list[Tensor]:
    """All that the U-Net is told: hidden states `[B, T, C]`, and `[B, P]` where there is a pooled vector."""
    return [conditioning.hidden, *([] if conditioning.pooled is None else [conditioning.pooled])]


class WithUNet(Objective):
    """An objective whose gradient goes through the U-Net, which is what takes memory."""

    PIXELS_AT_ONCE = 2**14  # of latents: beyond that a larger batch takes memory and saves no time

    def __init__(self, session: Session, bank: Bank) -> None:
        self.session, self.bank = session, bank
        self.at_once = max(1, self.PIXELS_AT_ONCE // bank.x[0, 0].numel())  # latents that go through the U-Net together

    def lighten(self) -> bool:
        """First one latent at a time, then activations are computed again in the backward pass."""
        if self.at_once > 1:
            self.at_once = 1
            return True
        return self.session.save_memory()


class Denoising(WithUNet):
    """Match the U-Net's noise prediction: d(eps(x_t, t, E), eps(x_t, t, target)) / d(eps(x_t, t, empty), the same).

    Only the branch that holds the embedding is run: under CFG the other is the same for both, so the difference of the
    guided predictions is this one times a constant. `checks` is a bank that knows the empty prompt's eps.
    """

    FIXED_ENTRIES = 12  # of an optimizer that needs the same loss at every call

    def __init__(
        self, session: Session, target: Target, bank: Bank, checks: Bank, distance: Distance, batch: int
    ) -> None:
        super().__init__(session, bank)
        self.target, self.distance = target, distance
        self.batch = min(batch, len(bank))
        self.scale = 1 / distance(checks.empty, checks.target).mean().clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> Tensor:
        """One entry from each of `batch` equal stretches of the trajectories, so every step sees all noise levels."""
        count = min(max(self.batch, self.FIXED_ENTRIES), len(self.bank)) if fixed else self.batch
        chosen = spread(len(self.bank), count, None if fixed else generator)
        return chosen.to(self.bank.x.device, non_blocking=True)

    def losses(self, vectors: Vectors, drawn: Tensor) -> Iterator[Tensor]:
        bank = self.bank
        for at in drawn.split(self.at_once):
            conditioning = self.target.embed(self.session, vectors)
            eps = self.session.predict_noise(bank.x[at], bank.timestep[at], conditioning)
            yield self.distance(eps, bank.target[at]).sum() * (self.scale / len(drawn))


class CrossAttention(Objective):
    """Match the outputs of the U-Net's cross-attention layers, for the queries met under the target:

        mean over layers l of d(A_l(q, z(E)), A_l(q, z*)) / d(A_l(q, z(empty)), A_l(q, z*))

    No U-Net runs: a step costs the text encoder and the layers themselves, over a few queries. The pooled vector, which
    SDXL adds to the timestep instead of attending to it, counts like the output of one more layer.
    """

    def __init__(self, session: Session, target: Target, queries: Queries, distance: Distance) -> None:
        if target.composed():
            raise RequestError(
                "The cross-attention part can't follow prompts composed with AND: each has an attention of its own. "
                "Use the unet part, which can."
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


class DenoisingInSentences(WithUNet):
    """Match the predicted noise with the embedding alone and inside of random sentences at once.

    Per sentence s, over a few latents x of the stand-alone target:

        mean d(eps(x, z_s(E)), eps(x, z_s*)) / (mean d(eps(x, z_s(plain)), eps(x, z_s*)) + FLOOR far)

    with far = mean d(eps(x, z(empty)), eps(x, z*)). As InSentences, but of what the whole U-Net makes of the text; both
    references are run anew for every sentence, so a step costs five thirds of a Denoising step of as many latents.
    """

    FLOOR, FRESH, FIXED, LATENTS = 0.01, 3, 12, 2

    def __init__(
        self, session: Session, target: Target, bank: Bank, checks: Bank, distance: Distance, text: str,
        avoid: Sequence[str],
    ) -> None:  # fmt: skip
        super().__init__(session, bank)
        self.distance, self.text, self.avoid = distance, text, set(avoid)
        self.floor = self.FLOOR * distance(checks.empty, checks.target).mean().clamp_min(TINY)

    def draw(self, generator: torch.Generator, fixed: bool) -> list:
        seed = 0 if fixed else int(torch.randint(2**31, (1,), generator=generator))
        chosen = sentences.distinct(
            Random(seed), self.FIXED if fixed else self.FRESH, self.avoid, self.session.random_text
        )
        return self.prepared([HOLE, *chosen], self.bank, torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def prepared(self, chosen: Sequence[str], bank: Bank, generator: torch.Generator) -> list:
        """For sentences: frames, and x, timestep and eps `[S*L, ...]` of L latents each, and scales `[S]`."""
        frames, wanted, plain = in_sentences(self.session, self.text, chosen)
        at = torch.cat([spread(len(bank), self.LATENTS, generator) for _ in chosen]).to(bank.x.device)
        x, timestep = bank.x[at], bank.timestep[at]
        eps, unweighted = (
            noise_under(self.session, x, timestep, each.repeat_each(self.LATENTS)) for each in (wanted, plain)
        )
        off = self.distance(unweighted, eps).view(-1, self.LATENTS).mean(1)
        return [frames, x, timestep, eps, 1 / (off + self.floor)]

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        frames, x, timestep, wanted, scales = drawn
        shares = scales.repeat_interleave(self.LATENTS) / len(x)
        for first in range(0, len(x), self.at_once):
            at = slice(first, first + self.at_once)
            # All sentences, as shorter ones are filled up to the longest.
            given = self.session.encode(frames, vectors).repeat_each(self.LATENTS).rows(at)
            eps = self.session.predict_noise(x[at], timestep[at], given)
            yield (self.distance(eps, wanted[at]) * shares[at]).sum()


def in_sentences(session: Session, text: str, chosen: Sequence[str]) -> tuple[list[str], Conditioning, Conditioning]:
    """Sentences as frames for the embedding, and their S conditionings with the prompt and without its weights.

    Only the prompt's own weights are left out, not the sentence's.
    """
    frames = [s.replace(HOLE, session.placeholder) for s in chosen]
    filled = [s.replace(HOLE, text) for s in chosen]
    rows = session.token_vectors(text)
    if max(map(len, rows.values())) > session.info.chunk_length:  # more than an embedding can hold
        plain = session.encode(filled, weighted=False)
    else:
        plain = session.encode(frames, rows)
    return frames, session.encode(filled), plain


def spread(available: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` of `available` indices, one of each of as many stretches: at random, or its middle without generator."""
    edges = torch.linspace(0, available, count + 1)
    inside = torch.rand(count, generator=generator) if generator else torch.full((count,), 0.5)
    return (edges[:-1] + inside * edges.diff()).long().clamp(max=available - 1)


class Together(Objective):
    """The mean of several objectives: one per sentence the embedding is made for."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = objectives

    def draw(self, generator: torch.Generator, fixed: bool) -> list:
        return [objective.draw(generator, fixed) for objective in self.objectives]

    def losses(self, vectors: Vectors, drawn: list) -> Iterator[Tensor]:
        for objective, part in zip(self.objectives, drawn, strict=True):
            for loss in objective.losses(vectors, part):
                yield loss / len(self.objectives)

    def lighten(self) -> bool:
        lightened = [objective.lighten() for objective in self.objectives]  # all of them, not up to the first
        return any(lightened)
