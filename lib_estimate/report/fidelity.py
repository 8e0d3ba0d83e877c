"""How close an embedding came: the figures and pictures people see, on noise and in sentences never learnt from.

What is measured is what is drawn: the pictures' own way from noise gives the latents that everything else is measured
on, so a report costs little more than its pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning, Network, Session, StepConditioning, Trajectory
from lib_estimate.request import EstimateRequest, Use
from lib_estimate.request import Target as Which
from lib_estimate.target import besides, sentences
from lib_estimate.target.bank import (
    HELD_OUT,
    PICTURES,
    Bank,
    bank_of,
    bank_under,
    build_bank,
    latent_noise,
    noise_under,
)
from lib_estimate.target.error import recovered_share, share_of_empty, squared
from lib_estimate.target.target import Target, build_target

LEVELS = 8  # noise levels of a generation that are measured at
SEEDS = 2  # generations measured on where no pictures are drawn
SENTENCES, SENTENCE_LATENTS = 6, 4  # and how many latents each is measured on
BESIDE_STEPS = 5  # of the generation beside each prompt that a negative embedding is measured on

Progress = tuple[str, int, int]  # phase, done, total


@dataclass(frozen=True)
class ErrorThere:
    """The error of the embedding in one sentence, or beside one prompt, and that of the prompt without its weights
    there."""

    text: str  # of the sentence, or of the prompt on the other side of CFG
    error: float  # weighted by what moves the picture, as a share of the empty prompt's
    unweighted_error: float | None
    share: float | None  # of the unweighted prompt's pooled error: below 1 is better than leaving the weights out
    fitted: bool  # whether the embedding was made for this very text

    def worse(self) -> bool:
        """Whether the prompt without its weights comes closer, by either way of counting."""
        return self.share is not None and (self.share > 1 or self.error > (self.unweighted_error or math.inf))


@dataclass(frozen=True)
class Fidelity:
    """The figures of one embedding, and the pictures behind them."""

    picture_error: float | None  # of the finished latents; a share of the reference's squared difference
    reference: str  # of in_words.REFERENCES: what the prompt's pictures are compared with
    error: float  # 0: the U-Net does the same as under the prompt; 1: as far away as under an empty prompt
    unweighted_error: float | None  # the same for the prompt without its weights
    recovered: float | None  # share of the emphasis the embedding carries at single steps
    sentences: tuple[ErrorThere, ...]
    pixel_difference: float | None  # mean absolute difference of the pictures, 0 to 1
    unweighted_pixel_difference: float | None
    pictures: dict[str, Tensor] = field(repr=False)  # "prompt", "embedding", reference -> [B, 3, H, W] in 0..1
    picture_errors: tuple[float, ...] = ()  # picture by picture
    unweighted_noise: float | None = None  # as unweighted_error, but with all noise levels alike: a curve's own scale
    beside: tuple[ErrorThere, ...] = ()  # of a negative embedding: beside the user's prompts and beside others
    taken: int = 0  # which of the candidates was measured last and so is meant
    checkpoints: tuple[OnCheckpoint, ...] = ()  # of several: each one's own, the first's being the figures here, too

    def below_plain(self) -> bool:
        """Whether leaving the weights out, or the LoRA, comes nearer where the embedding stands alone."""
        return self.reference != "empty" and (
            (self.recovered or 0) < 0
            or self.error > (self.unweighted_error or math.inf)
            or (self.picture_error or 0) > 1
        )

    def hardest(self) -> Fidelity:
        """The figures of the checkpoint with the largest error, where there are several."""
        return max((row.fidelity for row in self.checkpoints), key=lambda one: one.error, default=self)

    def figures(self) -> dict[str, Any]:
        """The numbers alone, as plain values."""
        return {
            "picture_error": self.picture_error,
            "picture_errors": list(self.picture_errors),
            "picture_reference": self.reference,
            "error": self.error,
            "unweighted_error": self.unweighted_error,
            "recovered": self.recovered,
            "sentence_error": median_and_worst(self.sentences, fitted=False),
            "fitted_sentence_error": median_and_worst(self.sentences, fitted=True),
            "sentences": [asdict(s) for s in self.sentences],
            "beside_error": median_and_worst(self.beside, fitted=True),
            "other_beside_error": median_and_worst(self.beside, fitted=False),
            "beside": [asdict(s) for s in self.beside],
            "pixel_difference": self.pixel_difference,
            "unweighted_pixel_difference": self.unweighted_pixel_difference,
            **({"checkpoints": [each.figures() for each in self.checkpoints]} if self.checkpoints else {}),
        }


def median_and_worst(there: Sequence[ErrorThere], fitted: bool) -> dict[str, float] | None:
    """Of what is left where the embedding was made for the text, or else elsewhere: of the unweighted prompt's error,
    or of the empty prompt's where there are no weights."""
    shares = [one.error if one.share is None else one.share for one in there if one.fitted is fitted]
    return {"median": median(shares), "worst": max(shares)} if shares else None


@dataclass(frozen=True)
class OnCheckpoint:
    """The figures of one of several checkpoints."""

    name: str
    hash: str | None
    fidelity: Fidelity
    worse: bool  # whether leaving the weights out would do better there

    def figures(self) -> dict[str, Any]:
        """The numbers alone, as plain values."""
        return {"name": self.name, "hash": self.hash, **self.fidelity.figures(), "worse": self.worse}


def exact(target: Target, chosen: Sequence[str]) -> Fidelity:
    """The figures of vectors that are the prompt's own tokens: no difference anywhere, and nothing to draw."""
    said = tuple(ErrorThere(sentence, 0.0, None, None, False) for sentence in chosen)
    return Fidelity(0.0, "empty", 0.0, None, None, said, None, None, {})


def report_sentences(request: EstimateRequest) -> tuple[str, ...]:
    """The sentences a report is made of: those the user gave, or caption-like ones that depend on the seed only.

    With --use sentence the user's are learnt from, and the report has others besides, but where a LoRA is taken over. A
    whole negative prompt is judged beside prompts instead.
    """
    given = request.sentence
    if request.take_over_lora or (given and request.use is not Use.SENTENCE):
        return given  # each other one would have a LoRA put in and taken out again
    if request.target is Which.NEGATIVE and request.use is Use.WHOLE:
        return ()  # it is the whole negative prompt: what counts is what stands beside it
    rng, found = Random(f"report {request.seed}"), dict[str, None]()
    while len(found) < SENTENCES:
        sentence = sentences.caption_like(rng)
        if sentence != sentences.HOLE:
            found[sentence] = None
    return (*given, *found)


def measure(
    session: Session,
    target: Target,
    request: EstimateRequest,
    candidates: Sequence[Callable[[], Vectors]],
    chosen: Sequence[str],
) -> Iterator[Progress | Fidelity]:
    """Measures the first candidate that does no worse than leaving the weights out, alone and in the chosen sentences,
    or else the last. Yields progress and last the Fidelity.

    target: the prompt alone. A sentence the embedding isn't made for does not count: with --use whole none does.
    """
    yield from first_good(Court(session, target, request, chosen), candidates)


def first_good(court: Court, candidates: Sequence[Callable[[], Any]]) -> Iterator[Progress | Fidelity]:
    """The Fidelity of the first candidate that is good enough for the court, or else of the last."""
    yield from court.prepare()
    for number, candidate in enumerate(candidates):
        last = number + 1 == len(candidates)
        judged = yield from court.judge(candidate(), pictures_anyway=last)
        if judged is not None and (last or not court.worse(judged)):
            yield replace(judged, taken=number)
            return


class Court:
    """What every candidate is measured against, made once."""

    def __init__(self, session: Session, target: Target, request: EstimateRequest, chosen: Sequence[str]) -> None:
        """target: the prompt alone; chosen: the sentences to measure in."""
        self.session, self.target, self.request, self.chosen = session, target, request, chosen
        takes_over = bool(target.guidance[0].negative.networks)
        self.reference = "empty" if target.plain is None else "without_lora" if takes_over else "unweighted"
        self.finals: dict[str, Tensor] = {}
        self.banks: dict[str, tuple[Target, Bank]] = {}  # of each sentence
        self.beside: dict[str, Bank] = {}  # of each prompt that a negative one is measured beside
        self.suspects: list[str] = []  # sentences that a candidate was worse in, the latest first
        self.bars: list[Callable[[Fidelity], bool]] = [self.below_plain]  # each tells what is not good enough

    def prepare(self) -> Iterator[Progress]:
        """Draws the prompt's pictures, and those of what it is compared with, and measures on their way."""
        target, images = self.target, self.request.images
        self.session.place(Network.TEXT)
        inside = {sentence: build_target(self.request, self.session, sentence) for sentence in self.chosen}
        self.session.place(Network.UNET)
        path = yield from self._draw("prompt", target.guidance)
        self.bank = self._bank(path)
        if images:
            plain = target.plain if target.plain is not None else target.with_embedding(target.empty)
            yield from self._draw(self.reference, plain)
        few = torch.linspace(0, len(self.bank) - 1, SENTENCE_LATENTS).round().long()
        shared = self.bank.at(few)
        for number, sentence in enumerate(self.chosen):
            yield "Sentences", number, len(self.chosen)
            there = inside[sentence]
            self.banks[sentence] = there, bank_under(self.session, shared, there, self.request.cfg_scale)
        yield from self._record_beside()

    def _bank(self, path: Trajectory) -> Bank:
        """What the prompt's pictures met on their way."""
        return bank_of(
            self.session, self.target, path, range(len(self.target.guidance)), self.request.cfg_scale, levels=LEVELS
        )

    def _eps(self, embedding: Any) -> Tensor:
        """What the U-Net says of the bank's latents under the embedding."""
        return noise_under(self.session, self.bank.x, self.bank.timestep, embedding)

    def _record_beside(self) -> Iterator[Progress]:
        """A short generation beside each prompt, on the way of which a negative embedding is measured."""
        if not self.target.negative:
            return
        texts = (*besides.own(self.request), *besides.others(self.request))
        self.session.place(Network.TEXT)
        targets = {text: build_target(self.request, self.session, beside=text) for text in texts}
        self.session.place(Network.UNET)
        noise = latent_noise(self.request, self.session, HELD_OUT, 1)
        for number, (text, target) in enumerate(targets.items()):
            yield "Other prompts", number, len(targets)
            *_, self.beside[text] = build_bank(
                self.session, target, noise, self.request.cfg_scale, steps=min(BESIDE_STEPS, len(target.guidance))
            )

    def judge(self, vectors: Vectors, pictures_anyway: bool) -> Iterator[Progress]:
        """The Fidelity of vectors; None where they are worse by noise already, unless pictures are wanted anyway."""
        self.session.place(Network.TEXT)
        with torch.no_grad():
            embedding = self.target.embed(self.session, vectors)
            embedded = {sentence: inside.embed(self.session, vectors) for sentence, (inside, _) in self.banks.items()}
        self.session.place(Network.UNET)
        yield "Noise", 0, 1
        fidelity = self._by_noise(embedding)
        fidelity = replace(fidelity, beside=tuple(self._beside(embedding)))
        if not pictures_anyway and self.worse(fidelity):
            return None
        measured: dict[str, ErrorThere] = {}
        # Where the candidate before was worse this one may be, too: one look there saves the looks elsewhere.
        for sentence in dict.fromkeys([*self.suspects, *self.banks]):
            measured[sentence] = self._in_sentence(sentence, embedded[sentence])
            fidelity = replace(fidelity, sentences=tuple(measured[s] for s in self.banks if s in measured))
            if not pictures_anyway and self.worse(fidelity):
                self.suspects.insert(0, sentence)
                return None
        if not self.request.images:
            return fidelity
        yield from self._draw("embedding", self.target.with_embedding(embedding))
        self.session.place(Network.VAE)
        finals = [self.finals[name] for name in ("embedding", "prompt", self.reference)]
        order = ("prompt", "embedding", self.reference)
        pictures = {name: self.session.decode(self.finals[name]) for name in order}
        return replace(
            fidelity,
            picture_error=picture_error(*finals),
            picture_errors=tuple(picture_errors(*finals).tolist()),
            pixel_difference=_difference(pictures, "embedding"),
            unweighted_pixel_difference=_difference(pictures, self.reference) if self.target.plain else None,
            pictures=pictures,
        )

    def worse(self, fidelity: Fidelity) -> bool:
        """Whether something that could be taken instead would do better."""
        return any(below(fidelity) for below in self.bars)

    def below_plain(self, fidelity: Fidelity) -> bool:
        """Whether leaving the weights out would do better where the embedding is meant to stand."""
        if self.target.plain is None:
            return False
        return (self.alone() and fidelity.below_plain()) or any(s.worse() for s in self.meant(fidelity))

    def each(self, fidelity: Fidelity) -> list[tuple[Court, Fidelity]]:
        """The courts of single checkpoints, with their own figures."""
        return [(self, fidelity)]

    def alone(self) -> bool:
        """Whether the embedding is meant to stand alone."""
        return self.request.use is not Use.SENTENCE

    def meant(self, fidelity: Fidelity) -> list[ErrorThere]:
        """The sentences, as far as they are measured, that the embedding is meant to stand in, and the prompts that a
        negative one is meant to stand beside."""
        use, sentences = self.request.use, fidelity.sentences
        beside = fidelity.beside if self.alone() else ()
        return [*beside, *(s for s in sentences if use is Use.ANYWHERE or (use is Use.SENTENCE and s.fitted))]

    def _by_noise(self, embedding: Conditioning) -> Fidelity:
        """The figures of the embedding alone, but for pictures."""
        bank, eps = self.bank, self._eps(embedding)
        unweighted, plain = (
            None if bank.plain is None else share_of_empty(bank.plain, bank, weighted=weighted)
            for weighted in (True, False)
        )
        return Fidelity(
            picture_error=None,
            reference=self.reference,
            error=share_of_empty(eps, bank, weighted=True),
            unweighted_error=unweighted,
            recovered=recovered_share(share_of_empty(eps, bank), plain),
            sentences=(),
            unweighted_noise=plain,
            pixel_difference=None,
            unweighted_pixel_difference=None,
            pictures={},
        )

    def _in_sentence(self, sentence: str, embedded: Conditioning) -> ErrorThere:
        fitted = self.request.use is Use.SENTENCE and sentence in self.request.sentence
        return self._there(sentence, self.banks[sentence][1], embedded, fitted)

    def _beside(self, embedding: Conditioning) -> Iterator[ErrorThere]:
        own = besides.own(self.request)
        return (self._there(text, bank, embedding, text in own) for text, bank in self.beside.items())

    @torch.no_grad()
    def _there(self, text: str, bank: Bank, conditioning: Conditioning, fitted: bool) -> ErrorThere:
        eps = noise_under(self.session, bank.x, bank.timestep, conditioning)
        unweighted = share = None
        if bank.plain is not None:
            unweighted = share_of_empty(bank.plain, bank, weighted=True)
            share = squared(eps, bank, weighted=False) / max(squared(bank.plain, bank, weighted=False), 1e-30)
        return ErrorThere(text, share_of_empty(eps, bank, weighted=True), unweighted, share, fitted)

    def _draw(self, name: str, guidance: tuple[StepConditioning, ...]) -> Iterator[Progress]:
        noise = latent_noise(self.request, self.session, PICTURES, self.request.images or SEEDS)
        for progress in self.session.sample(noise, guidance, self.request.cfg_scale):
            if isinstance(progress, Trajectory):
                self.finals[name] = progress.final
                return progress
            yield f"Pictures ({name})", progress, len(guidance)


def picture_errors(given: Tensor, wanted: Tensor, reference: Tensor) -> Tensor:
    """|x0 - x0*|^2 / |x0(reference) - x0*|^2 of finished latents `[B, c, h, w]`, seed by seed, `[B]`."""
    off, far = ((x - wanted).float().square().flatten(1).sum(1) for x in (given, reference))
    least = 1e-9 * wanted.float().square().flatten(1).sum(1)  # two equal pictures are as good as any
    return (off + least) / (far + least)


def picture_error(given: Tensor, wanted: Tensor, reference: Tensor) -> float:
    """The geometric mean of `picture_errors`: now and then a picture flips into another, which an ordinary mean is
    ruled by. So it does not show that one did: that is what the figures picture by picture are for."""
    return float(picture_errors(given, wanted, reference).log().mean().exp())


def _difference(pictures: dict[str, Tensor], name: str) -> float | None:
    """Mean absolute difference to the prompt's pictures, per pixel and channel in 0..1."""
    if name not in pictures:
        return None
    return float((pictures[name] - pictures["prompt"]).abs().mean())
