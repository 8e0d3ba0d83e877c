"""Several words in their places at once: for the texts of a prompt with AND or editing, for both sides of CFG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Session, StepConditioning
from lib_estimate.request import EstimateRequest
from lib_estimate.request import Target as Which
from lib_estimate.target.target import Target, build_target

Place = tuple[tuple[tuple[float, int], ...] | None, int | None]  # per step: (weight, word) of the prompt; negative word


@dataclass(frozen=True)
class Together:
    """What `Target` is for one word, for several. The generation is given with CFG: both sides of it may be words."""

    guidance: tuple[StepConditioning, ...]  # per sampling step
    plain: tuple[StepConditioning, ...] | None  # the same with the weights left out that become words; None: no weights
    empty: Conditioning
    words: tuple[Target, ...]  # each word's own
    places: tuple[Place, ...]  # per sampling step; None: that side stays as it is

    negative = False

    def embed(self, session: Session, vectors: Sequence[Vectors]) -> tuple[Conditioning, ...]:
        """The conditioning of each word."""
        return tuple(word.embed(session, own) for word, own in zip(self.words, vectors, strict=True))

    def with_embedding(self, embedded: Sequence[Conditioning]) -> tuple[StepConditioning, ...]:
        """The guidance with the words' conditionings in their places."""
        out = []
        for given, (positive, negative) in zip(self.guidance, self.places, strict=True):
            parts = given.positive if positive is None else tuple((weight, embedded[n]) for weight, n in positive)
            out.append(StepConditioning(parts, given.negative if negative is None else embedded[negative]))
        return tuple(out)

    def emptied(self) -> tuple[StepConditioning, ...]:
        """The guidance with nothing in the words' places."""
        return self.with_embedding([self.empty] * len(self.words))


def build_together(
    request: EstimateRequest,
    session: Session,
    words: Sequence[Target],
    texts: tuple[Sequence[str] | None, Sequence[str] | None],
) -> Together:
    """texts: those of the prompt and of the negative prompt that have words, the prompt's first; None: none has."""
    sides = {
        which: build_target(_of_side(request, which), session, beside=request.prompt)
        for which, own in zip((Which.PROMPT, Which.NEGATIVE), texts, strict=True)
        if own is not None
    }
    first = next(iter(sides.values()))
    return Together(first.guidance, _plain(sides), first.empty, tuple(words), _places(request, session, texts))


def _of_side(request: EstimateRequest, which: Which) -> EstimateRequest:
    return replace(request, target=which, stages=False)


def _plain(sides: dict[Which, Target]) -> tuple[StepConditioning, ...] | None:
    """The guidance without the weights of the sides that become words."""
    if all(side.plain is None for side in sides.values()):
        return None
    whole = {which: side.guidance if side.plain is None else side.plain for which, side in sides.items()}
    positive = whole.get(Which.PROMPT) or whole[Which.NEGATIVE]
    negative = whole.get(Which.NEGATIVE) or whole[Which.PROMPT]
    return tuple(StepConditioning(p.positive, n.negative) for p, n in zip(positive, negative, strict=True))


def _places(request: EstimateRequest, session: Session, texts: tuple) -> tuple[Place, ...]:
    steps = request.sampling_steps
    positive, negative = session.read(request.prompt, steps), session.read(request.negative, steps, negative=True)
    own, other = texts
    first = len(own or ())  # of the negative prompt's words

    def place(step: int) -> Place:
        if not request.stages:  # a word each, for the whole of it
            return None if own is None else ((1.0, 0),), None if other is None else first
        parts = None
        if own is not None:
            parts = tuple((part.weight, own.index(part.text_at(step).strip())) for part in positive)
        return parts, None if other is None else first + other.index(negative[0].text_at(step).strip())

    return tuple(map(place, range(steps)))
