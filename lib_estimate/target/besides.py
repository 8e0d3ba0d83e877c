"""The prompts a negative embedding is fitted and judged beside.

It is used against many, and what a negative prompt does depends on the prompt beside it: what is learnt beside one
alone may hold less beside others.
"""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from lib_estimate.request import HOLE, EstimateRequest
from lib_estimate.target import sentences

AT_LEAST = 4  # learnt beside; plain ones are added to the user's
OTHERS = 4  # that nothing was learnt beside, in the report


def own(request: EstimateRequest) -> tuple[str, ...]:
    """The user's prompts."""
    return tuple(dict.fromkeys(text for text in (request.prompt, *request.beside) if text.strip()))


def learnt(request: EstimateRequest) -> tuple[str, ...]:
    """The prompts to learn beside, the user's first. Pictures are shown beside the first."""
    given = own(request)
    return (*given, *_plain(Random(f"beside {request.seed}"), AT_LEAST - len(given), given))


def others(request: EstimateRequest) -> tuple[str, ...]:
    """Prompts for the report, never among those learnt beside."""
    return _plain(Random(f"report beside {request.seed}"), OTHERS, learnt(request))


def _plain(rng: Random, count: int, avoid: Collection[str]) -> tuple[str, ...]:
    """Different captions of something simple."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = sentences.caption_like(rng).replace(HOLE, rng.choice(sentences.COMPANIONS))
        if text not in avoid:
            found[text] = None
    return tuple(found)
