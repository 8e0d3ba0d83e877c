"""How close an embedding came: the numbers and pictures people see, on noise and in sentences never learnt from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Session, StepConditioning, Trajectory
from lib_estimate.request import EstimateRequest, Use
from lib_estimate.target import sentences
from lib_estimate.target.bank import HELD_OUT, PICTURES, Bank, build_bank, latent_noise
from lib_estimate.target.error import denoising_error, recovered_share, share_of_empty
from lib_estimate.target.target import Target, build_target

SEEDS = 4  # noise that is measured on
OFFSET = -0.46  # its timesteps lie between those of a generation
SENTENCES = 6
SENTENCE_SEEDS, SENTENCE_STEPS = 2, 10  # of each sentence's own measurement

Progress = tuple[str, int, int]  # phase, done, total


@dataclass(frozen=True)
class SentenceError:
    """The error of the embedding in one sentence, and that of the prompt without its weights there."""

    sentence: str
    error: float
    unweighted_error: float | None
    share: float | None  # error / unweighted_error: below 1 is better than leaving the weights out
    fitted: bool  # whether the embedding was made for this very sentence


@dataclass(frozen=True)
class Fidelity:
    """The figures of one embedding, and the pictures behind them."""

    error: float  # 0: the U-Net does the same as under the prompt; 1: as far away as under an empty prompt
    unweighted_error: float | None  # the same for the prompt without its weights
    recovered: float | None  # share of the emphasis the embedding carries
    sentences: tuple[SentenceError, ...]
    pixel_difference: float | None  # mean absolute difference of the pictures, 0 to 1
    unweighted_pixel_difference: float | None
    pictures: dict[str, Tensor] = field(repr=False)  # "prompt", "embedding", "unweighted" -> [B, 3, H, W] in 0..1

    def figures(self) -> dict[str, Any]:
        """The numbers alone, as plain values."""
        return {
            "error": self.error,
            "unweighted_error": self.unweighted_error,
            "recovered": self.recovered,
            "sentence_error": self.sentence_error(fitted=False),
            "fitted_sentence_error": self.sentence_error(fitted=True),
            "sentences": [asdict(s) for s in self.sentences],
            "pixel_difference": self.pixel_difference,
            "unweighted_pixel_difference": self.unweighted_pixel_difference,
        }

    def sentence_error(self, fitted: bool) -> dict[str, float] | None:
        """Median and worst share over the sentences the embedding was made for, or over the others."""
        shares = [s.share for s in self.sentences if s.share is not None and s.fitted is fitted]
        return {"median": median(shares), "worst": max(shares)} if shares else None


def report_sentences(request: EstimateRequest, session: Session) -> tuple[str, ...]:
    """The sentences a report is made of: those the user gave, or caption-like ones that depend on the seed only.

    With --use sentence the user's are learnt from, and the report has others besides.
    """
    given = request.sentence
    if given and request.use is not Use.SENTENCE:
        return given
    rng, found = Random(f"report {request.seed}"), dict[str, None]()
    while len(found) < SENTENCES:
        sentence = sentences.caption_like(rng)
        if sentence != sentences.HOLE:
            found[sentence] = None
    return (*given, *found)


def measure(
    session: Session, target: Target, request: EstimateRequest, vectors: Vectors, chosen: Sequence[str]
) -> Iterator[Progress | Fidelity]:
    """Measures vectors alone and in the chosen sentences. Yields progress and last the Fidelity.

    target: the prompt alone.
    """
    with torch.no_grad():
        embedding = target.embed(session, vectors)
    bank = yield from _bank("Held-out noise", session, target, request, SEEDS, request.sampling_steps)
    error = denoising_error(session, bank, embedding)
    unweighted = None if bank.plain is None else share_of_empty(bank.plain, bank)
    in_sentences = []
    for number, sentence in enumerate(chosen):
        yield "Sentences", number, len(chosen)
        in_sentences.append((yield from _in_sentence(session, request, vectors, sentence)))
    pictures = yield from _pictures(session, target, request, embedding)
    yield Fidelity(
        error=error,
        unweighted_error=unweighted,
        recovered=recovered_share(error, unweighted),
        sentences=tuple(in_sentences),
        pixel_difference=_difference(pictures, "embedding"),
        unweighted_pixel_difference=_difference(pictures, "unweighted"),
        pictures=pictures,
    )


def _bank(
    phase: str | None, session: Session, target: Target, request: EstimateRequest, seeds: int, steps: int
) -> Iterator[Progress]:
    noise = latent_noise(request, session, HELD_OUT, seeds)
    for progress in build_bank(session, target, noise, request.cfg_scale, steps=steps, offset=OFFSET):
        if isinstance(progress, Bank):
            return progress
        if phase:
            yield phase, progress, steps


def _in_sentence(session: Session, request: EstimateRequest, vectors: Vectors, sentence: str) -> Iterator[Progress]:
    target = build_target(request, session, sentence)
    bank = yield from _bank(None, session, target, request, SENTENCE_SEEDS, SENTENCE_STEPS)
    with torch.no_grad():
        error = denoising_error(session, bank, target.embed(session, vectors))
    unweighted = None if bank.plain is None else share_of_empty(bank.plain, bank)
    fitted = request.use is Use.SENTENCE and sentence in request.sentence
    return SentenceError(sentence, error, unweighted, error / unweighted if unweighted else None, fitted)


def _pictures(
    session: Session, target: Target, request: EstimateRequest, embedding: Conditioning
) -> Iterator[Progress]:
    guidances = {"prompt": target.guidance, "embedding": target.with_embedding(embedding)}
    if target.plain is not None:
        guidances["unweighted"] = target.plain
    pictures: dict[str, Tensor] = {}
    if request.images:
        total = len(guidances) * request.sampling_steps
        for number, (name, guidance) in enumerate(guidances.items()):
            for progress in _draw(session, request, guidance):
                if isinstance(progress, Tensor):
                    pictures[name] = progress
                else:
                    yield "Pictures", number * request.sampling_steps + progress, total
    return pictures


def _draw(session: Session, request: EstimateRequest, guidance: tuple[StepConditioning, ...]) -> Iterator[int | Tensor]:
    noise = latent_noise(request, session, PICTURES, request.images)
    for progress in session.sample(noise, guidance, request.cfg_scale):
        yield session.decode(progress.final) if isinstance(progress, Trajectory) else progress


def _difference(pictures: dict[str, Tensor], name: str) -> float | None:
    """Mean absolute difference to the prompt's pictures, per pixel and channel in 0..1."""
    if name not in pictures:
        return None
    return float((pictures[name] - pictures["prompt"]).abs().mean())


def result_sentence(fidelity: Fidelity, name: str) -> str:
    """The figures in words."""
    text = f"{name} does {100 * (1 - fidelity.error):.1f}% of what the prompt does (error {fidelity.error:.4f})."
    if fidelity.recovered is not None:
        text += (
            f" It carries {100 * max(0.0, fidelity.recovered):.0f}% of the emphasis: without its weights the prompt "
            f"has error {fidelity.unweighted_error:.4f}."
        )
    for fitted, where in ((True, "In the sentences it was made for"), (False, "In other sentences")):
        shares = fidelity.sentence_error(fitted)
        if shares:
            text += (
                f"\n{where} its error is {shares['median']:.2f} of that without weights (median; worst "
                f"{shares['worst']:.2f}; above 1 is worse than leaving the weights out)."
            )
    return text
