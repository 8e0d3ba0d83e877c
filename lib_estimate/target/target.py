"""The target: what the model is told under the prompt, at every sampling step, and what stands in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lib_estimate.errors import RequestError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Network, PromptPart, Session, StepConditioning
from lib_estimate.request import HOLE, EstimateRequest
from lib_estimate.request import Target as Which
from lib_estimate.target import besides
from lib_estimate.target.limits import check_finite, check_readable

PartConditionings = list[tuple[PromptPart, dict[str, Conditioning]]]


@dataclass(frozen=True)
class Target:
    """The conditionings of a generation with the prompt, and what stands for 'nothing' and 'no emphasis'.

    The prompt may stand in a sentence; then the embedding stands there in its place.
    """

    guidance: tuple[StepConditioning, ...]  # per sampling step
    # The same without weights, or where a LoRA is to be taken over without that alone; None where the prompt has none.
    plain: tuple[StepConditioning, ...] | None
    empty: Conditioning
    negative: bool  # whether the negative prompt is what becomes the embedding
    frame: str  # the sentence, with the session's placeholder where the embedding stands

    def embed(self, session: Session, vectors: Vectors) -> Conditioning:
        """The conditioning of the embedding in its sentence; gradients reach the vectors."""
        return session.encode([self.frame], vectors)

    def with_embedding(self, embedding: Conditioning) -> tuple[StepConditioning, ...]:
        """The guidance with the embedding in the place of the text it stands for."""
        beside = self.guidance if self.plain is None else self.plain  # where no LoRA of the prompt is at work
        if self.negative:
            return tuple(StepConditioning(step.positive, embedding) for step in beside)
        return tuple(StepConditioning(((1.0, embedding),), step.negative) for step in beside)

    def wanted(self, step: int) -> tuple[tuple[float, Conditioning], ...]:
        """The weighted conditionings in the embedding's place at a sampling step."""
        given = self.guidance[step]
        return ((1.0, given.negative),) if self.negative else given.positive

    def networks(self) -> str:
        """The tags of the extra networks that the embedding is to take over."""
        return self.guidance[0].negative.networks

    def composed(self) -> bool:
        """Whether what is wanted is not one answer of the U-Net as it is: AND puts several conditionings into the
        embedding's place, and a LoRA changes the U-Net itself."""
        several = (len(w) != 1 or w[0][0] != 1.0 for w in map(self.wanted, range(len(self.guidance))))
        return bool(self.networks()) or any(several)

    def finite(self) -> bool:
        """Whether all that the U-Net is told are numbers."""
        told = {id(c): c for step in self.guidance for c in (*(c for _, c in step.positive), step.negative)}
        return all(bool(c.hidden.isfinite().all()) for c in told.values())

    def single(self) -> Conditioning | None:
        """The one conditioning that is in force at every step, or None where there are several."""
        steps = range(len(self.guidance))
        first = self.wanted(0)[0][1]
        same = not self.composed() and all(self.wanted(step)[0][1] is first for step in steps)
        return first if same else None


@torch.no_grad()
def build_target(request: EstimateRequest, session: Session, sentence: str = HOLE, beside: str = "") -> Target:
    """Encodes the prompts of a request, in a sentence, once for every step where they change.

    beside: the prompt that a negative one stands beside; blank: the first that it is learnt beside. RequestError where
    the text encoders' answers are no numbers.
    """
    target, positive, negative = _built(request, session, sentence, beside)
    if not target.finite() and session.widen(Network.TEXT):
        target, positive, negative = _built(request, session, sentence, beside)
    check_finite(session, positive, (each for step in target.guidance for _, each in step.positive), "prompt")
    check_finite(session, negative, (step.negative for step in target.guidance), "negative prompt")
    return target


def _built(
    request: EstimateRequest, session: Session, sentence: str, beside: str
) -> tuple[Target, list[PromptPart], list[PromptPart]]:
    """The target, and the two sides as the host reads them."""
    steps, is_negative = request.sampling_steps, request.target is Which.NEGATIVE
    texts = [(beside or besides.learnt(request)[0]) if is_negative else request.prompt, request.negative]
    texts[is_negative] = sentence.replace(HOLE, request.text)
    positive, negative = session.read(texts[0], steps), session.read(texts[1], steps, negative=True)
    if not beside and sentence == HOLE:  # what comes later, too, is refused now
        for text in (*(besides.own(request) if is_negative else ()), *request.sentence):
            check_readable(session, session.read(text.replace(HOLE, session.placeholder), steps), "prompt")
    check_readable(session, positive, "prompt")
    check_readable(session, negative, "negative prompt")
    frame = _frame(session, sentence, is_negative)

    def guided(**how: Any) -> tuple[StepConditioning, ...]:
        return _guidance(_encode(session, positive, **how), _encode(session, negative, negative=True, **how), steps)

    guidance = guided(networks=taken_over(request, session))
    unweighted = _guidance(
        _encode(session, positive, weighted=is_negative),
        _encode(session, negative, weighted=not is_negative, negative=True),
        steps,
    )
    own = session.token_vectors(own_text(request, session)) if sentence != HOLE and _simple(positive, negative) else {}
    if own and 0 < max(map(len, own.values())) <= session.info.chunk_length:
        # Only the prompt's own weights are left out, not the sentence's.
        plain = session.encode([frame], own)
        unweighted = Target(guidance, unweighted, plain, is_negative, frame).with_embedding(plain)
    empty = session.encode([""], negative=is_negative)
    if guidance[0].negative.networks:
        unweighted = guided()
    target = Target(guidance, unweighted, empty, is_negative, frame)
    return (target if _differ(target) else replace(target, plain=None)), positive, negative


def taken_over(request: EstimateRequest, session: Session) -> str:
    """The tags of the prompt's extra networks that are at work while the target is made."""
    return "".join(session.tags(request.prompt)[1]) if request.take_over_lora else ""


def own_text(request: EstimateRequest, session: Session) -> str:
    """The text that becomes the embedding, without tags: in a negative prompt they are words."""
    return request.text if request.target is Which.NEGATIVE else session.tags(request.prompt)[0]


def targets_on(request: EstimateRequest, sessions: Sequence[Session]) -> list[Target]:
    """The prompt alone, on each checkpoint."""
    targets = []
    for session in sessions:
        session.place(Network.TEXT)
        targets.append(build_target(request, session))
    return targets


def _simple(*prompts: Sequence[PromptPart]) -> bool:
    """Whether every prompt is one text at all steps."""
    return all(len(parts) == 1 and len(parts[0].texts) == 1 for parts in prompts)


def _frame(session: Session, sentence: str, negative: bool) -> str:
    parts = session.read(sentence.replace(HOLE, session.placeholder), 2, negative=negative)
    if len(parts) != 1 or len(parts[0].texts) != 1:
        raise RequestError(f"The sentence {sentence!r} changes from step to step or has AND: give a plain one.")
    return parts[0].texts[0][1]


def _differ(target: Target) -> bool:
    """Whether the prompt's weights change what the U-Net is told."""
    plain = Target(target.plain or (), None, target.empty, target.negative, target.frame)
    for step in range(len(target.guidance)):
        for (_, a), (_, b) in zip(target.wanted(step), plain.wanted(step), strict=True):
            if not a.same_as(b):
                return True
    return False


def _encode(
    session: Session,
    parts: Sequence[PromptPart],
    *,
    weighted: bool = True,
    negative: bool = False,
    networks: str = "",
) -> PartConditionings:
    """Each part's texts with their conditionings. The texts of one schedule are encoded together, as a webui does."""
    out: PartConditionings = []
    for part in parts:
        texts = list(dict.fromkeys(text for _, text in part.texts))
        encoded = session.encode(texts, weighted=weighted, together=True, negative=negative, networks=networks)
        out.append((part, {text: encoded.rows(slice(i, i + 1)) for i, text in enumerate(texts)}))
    return out


def _guidance(positive: PartConditionings, negative: PartConditionings, steps: int) -> tuple[StepConditioning, ...]:
    part, conditionings = negative[0]
    return tuple(
        StepConditioning(
            tuple((p.weight, known[p.text_at(step)]) for p, known in positive), conditionings[part.text_at(step)]
        )
        for step in range(steps)
    )
