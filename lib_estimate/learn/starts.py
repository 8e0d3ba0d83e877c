"""Where the vectors start for a prompt that is several texts: the best that can be made of their tokens, by trial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Network, PromptPart, Session
from lib_estimate.learn.initial import fitted, initial_vectors, pooled
from lib_estimate.progress import Phase
from lib_estimate.request import AUTO_VECTORS, INIT_TEXT, EstimateRequest, Start
from lib_estimate.target.bank import noise_under
from lib_estimate.target.error import share_of_empty
from lib_estimate.target.recording import Material, place
from lib_estimate.target.texts import texts_of


def how_many(request: EstimateRequest, session: Session, negative: bool) -> int:
    """How many candidates `best_start` looks at; 0 where there is nothing to choose."""
    parts = session.read(request.text, request.sampling_steps, negative=negative)
    if _given(request) or len(texts_of(parts)) == 1:
        return 0
    one = replace(request, vectors=INIT_TEXT) if request.vectors == AUTO_VECTORS else request
    return len(candidates(session, parts, len(next(iter(initial_vectors(one, session).values())))))


def _given(request: EstimateRequest) -> bool:
    """Whether the start is something else than the prompt's own tokens."""
    return bool(request.init.strip() or request.continue_from.strip() or request.start is Start.RANDOM)


def best_start(request: EstimateRequest, session: Session, materials: list[Material]) -> Iterator[Phase]:
    """The vectors to start from. Where they are the prompt's own and it is several texts, each candidate is looked at
    on the latents of the checks; what counts is what moves the picture."""
    if _given(request):
        return initial_vectors(request, session)
    parts = session.read(request.text, request.sampling_steps, negative=materials[0].target.negative)
    texts = texts_of(parts)
    if len(texts) == 1:
        return initial_vectors(request, session)
    count = len(next(iter(initial_vectors(request, session).values())))
    found = candidates(session, parts, count)
    place(materials, Network.TEXT, Network.UNET)
    errors = []
    for number, vectors in enumerate(found):
        yield Phase("Trying starts", number, len(found))
        errors.append(picture_moving_error(materials, vectors))
    return found[errors.index(min(errors))]


def candidates(session: Session, parts: list[PromptPart], count: int) -> list[Vectors]:
    """The texts' tokens after each other, in both orders, as far as they go and pooled; each text's own; and their
    mixture by weight. Each fills `count` vectors."""
    weights = {text.strip(): part.weight for part in parts for _, text in part.texts}
    rows = [session.token_vectors(text) for text in texts_of(parts)]
    end = session.end_vectors()

    def each(make) -> Vectors:
        return {key: make(key, [given[key] for given in rows]) for key in end}

    found = [each(lambda key, own, way=way: fitted(torch.cat(own[::way]), count, end[key])) for way in (1, -1)]
    if sum(len(given[key]) for given in rows for key in list(end)[:1]) > count:
        found.append(each(lambda key, own: pooled(torch.cat(own), count, end[key])))
    for number in range(len(rows)):
        found.append(each(lambda key, own, number=number: fitted(own[number], count, end[key])))
    shares = torch.tensor([abs(weight) for weight in weights.values()])
    shares = shares / shares.sum().clamp_min(1e-6)
    found.append(
        each(lambda key, own: sum(s.item() * fitted(r, count, end[key]) for s, r in zip(shares, own, strict=True)))
    )
    return found


@torch.no_grad()
def picture_moving_error(materials: list[Material], vectors: Vectors) -> float:
    """The error on the checks, weighted by what moves the finished picture; the mean over the materials."""
    errors = []
    for material in materials:
        checks = material.checks
        given = material.target.embed(material.session, vectors)
        eps = noise_under(material.session, checks.x, checks.timestep, given)
        errors.append(share_of_empty(eps, checks, weighted=True))
    return sum(errors) / len(errors)
