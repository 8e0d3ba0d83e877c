"""One estimate from request to file. A newcomer starts reading here.

for progress in estimate(request, host, cancel): ...   # Phase, Note, StepReport, and last an Outcome
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch

from lib_estimate import embedding_file, plan
from lib_estimate.embedding_file import Embedding, Vectors
from lib_estimate.errors import EstimateError
from lib_estimate.fidelity import Fidelity, denoising_error, measure, report_sentences
from lib_estimate.fit import Cancel, Fit, StepReport
from lib_estimate.hosts.base import Host, ModelInfo, Session
from lib_estimate.initial import initial_vectors
from lib_estimate.objectives import (
    CrossAttention,
    Denoising,
    DenoisingInSentences,
    HiddenState,
    InSentences,
    Objective,
    Together,
)
from lib_estimate.plan import Recording, Stage
from lib_estimate.queries import Queries, Recorder
from lib_estimate.registry import LOSSES
from lib_estimate.request import AUTO_VECTORS, HOLE, EstimateRequest, Format, Part, Start, Use
from lib_estimate.sentences import distinct
from lib_estimate.target import TRAIN, VALIDATION, Bank, Target, build_bank, build_target, joined, latent_noise

CHECK_SENTENCES = 8
# Vectors learnt in random sentences go too far for some that weren't drawn. Held back, they lose little alone.
SHARE_OF_THE_WAY = 0.65
FLOAT16_LOSS_SCALE = 4096.0


class Interrupted(EstimateError):
    """The user stopped the run and nothing is to be saved."""


@dataclass(frozen=True)
class Phase:
    """Progress of a part of the job that is not the learning itself."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Note:
    """A sentence the user should read."""

    text: str


@dataclass(frozen=True)
class Outcome:
    """What an estimate ended with."""

    path: Path
    embedding: Embedding
    fidelity: Fidelity
    losses: list[float]
    record: dict[str, Any]  # all of it as plain values, for JSON


Progress = Phase | Note | StepReport | Outcome


@dataclass(frozen=True)
class Material:
    """What is learnt from, for one sentence (or the prompt alone)."""

    target: Target
    bank: Bank
    checks: Bank
    queries: Queries
    check_queries: Queries  # met on the way to `checks`


def estimate(request: EstimateRequest, host: Host, cancel: Cancel | None = None) -> Iterator[Progress]:
    """Runs one estimate. Raises EstimateError with a sentence for the user."""
    cancel, started = cancel or Cancel(), time.perf_counter()
    path = check_destination(request)
    with host.session() as session:
        path = _for_model(path, request, session.info)
        _check_size(request, session.info)
        yield from _notes(request, session)
        alone = build_target(request, session)
        materials = yield from _materials(request, session, alone, cancel)
        start, counts = yield from _start(request, session, materials, cancel)
        run = yield from _learn(request, session, materials, start, cancel)
        if cancel.wanted == "discard":
            raise Interrupted("Interrupted. Nothing was saved.")

        chosen = report_sentences(request, session)
        yield from _warnings(request, session, materials[0], run.best, chosen)
        facts = _facts(request, session.info, run, counts)
        try:
            fidelity = yield from _measured(session, alone, request, run.best, chosen)
        except BaseException:  # whatever stops the report, what was learnt must not be lost
            embedding_file.save(Embedding(path.stem, run.best, facts), path, overwrite=request.overwrite)
            raise
        embedding = Embedding(path.stem, run.best, {**facts, **fidelity.figures()})
        embedding_file.save(embedding, path, overwrite=request.overwrite)
        seconds = time.perf_counter() - started
        record = _record(request, path, session.info, run, counts, fidelity, seconds)
    yield Outcome(path, embedding, fidelity, run.losses, record)


def measured(embedding: Embedding, request: EstimateRequest, host: Host) -> Iterator[Phase | Fidelity]:
    """Measures an embedding against a prompt, as at the end of an estimate."""
    with host.session() as session:
        _check_size(request, session.info)
        vectors = fitting_vectors(embedding, session.info)
        chosen = report_sentences(request, session)
        yield (yield from _measured(session, build_target(request, session), request, vectors, chosen))


# ---- before the run -----------------------------------------------------------------------------------------------


def check_destination(request: EstimateRequest) -> Path:
    """Where the file will be, before the model is known. Refuses bad requests and a name that is taken.

    A name is taken by a file of any format, in the folder or below it. Overwriting replaces that very file.
    """
    request.validate()
    folder, name = Path(request.out), embedding_file.check_name(request.name)
    suffix = Format.PT.value if request.format is Format.AUTO else request.format.value
    path = embedding_file.embedding_path(folder / request.subfolder, name, suffix)
    existing = path if path.exists() else embedding_file.find_existing(folder, name)
    if existing is None:
        return path
    if not request.overwrite:
        raise EstimateError(f"{existing} exists already. Choose another name, or allow overwriting (--overwrite).")
    if existing.suffix.lower().lstrip(".") not in embedding_file.FORMATS:
        raise EstimateError(f"{existing} has this name, and can't be overwritten: it is no .pt or .safetensors file.")
    return existing


def _for_model(path: Path, request: EstimateRequest, info: ModelInfo) -> Path:
    """The file's place once the model is known: SDXL's two kinds of vectors go into safetensors only."""
    pt = path.suffix.lower() == f".{Format.PT.value}"
    if len(info.widths) == 1 or not pt:
        return path
    if path.exists():
        raise EstimateError(f"{path} can't be overwritten by an SDXL embedding, which is never .pt: take another name.")
    if request.format is Format.PT:
        raise EstimateError("An SDXL embedding can't be saved as .pt. Choose safetensors, or auto, as the file format.")
    return path.with_suffix(f".{Format.SAFETENSORS.value}")


def _check_size(request: EstimateRequest, info: ModelInfo) -> None:
    for side in ("width", "height"):
        if getattr(request, side) % info.latent_scale:
            raise EstimateError(
                f"{side} is {getattr(request, side)}: it must be a multiple of {info.latent_scale} pixels."
            )


def _notes(request: EstimateRequest, session: Session) -> Iterator[Note]:
    shadow = embedding_file.shadowed_word(request.name, session.token_ids)
    texts = dict.fromkeys([request.text, request.prompt, request.negative, request.init, *request.sentence])
    notes = dict.fromkeys(note for text in texts if text for note in session.notes(text))
    for text in [*notes, *([shadow] if shadow else [])]:
        yield Note(text)


def fitting_vectors(embedding: Embedding, info: ModelInfo) -> Vectors:
    """The embedding's vectors under the model's own keys; EstimateError where their widths differ."""
    rows = list(embedding.vectors.values())
    widths = [r.shape[1] for r in rows]
    if widths != list(info.widths.values()):
        raise EstimateError(
            f"{embedding.name} holds vectors of width {', '.join(map(str, widths))}, the model {info.name} needs "
            f"{', '.join(map(str, info.widths.values()))}: it was made for another kind of model."
        )
    return {key: r.to(info.device) for key, r in zip(info.widths, rows, strict=True)}


# ---- the target, recorded -----------------------------------------------------------------------------------------


def _materials(request: EstimateRequest, session: Session, alone: Target, cancel: Cancel) -> Iterator[Phase]:
    """One Material per sentence the embedding is made for; the prompt alone unless sentences are given."""
    if request.use is Use.SENTENCE:
        targets = [build_target(request, session, sentence) for sentence in request.sentence]
    else:
        targets = [alone]
    materials = []
    for target in targets:
        materials.append((yield from _material(request, session, target, cancel)))
    return materials


def _material(request: EstimateRequest, session: Session, target: Target, cancel: Cancel) -> Iterator[Phase]:
    def recorded(phase: str, region: int, what: Recording, **how: Any) -> Iterator[Phase]:
        ways = len(what.offsets)
        recorder = Recorder(request.queries, ways * what.steps, int(request.memory * 2**30) // 2, request.seed)
        noise = latent_noise(request, session, region, ways * what.count).split(what.count)
        banks = []
        for part, offset in zip(noise, what.offsets, strict=True):
            how |= {"steps": what.steps, "offset": offset, "watch": recorder.see}
            sampling = build_bank(session, target, part, request.cfg_scale, **how)
            banks.append((yield from _sampled(phase, sampling, what.steps, cancel)))
        bank, order = joined(banks)
        return bank, recorder.queries(bank.step, order)

    bank, queries = yield from recorded("Recording the target", TRAIN, plan.recording(request), references=False)
    checks, check_queries = yield from recorded("Recording checks", VALIDATION, plan.CHECKS, plain=False)
    return Material(target, bank, checks, queries, check_queries)


def _sampled(phase: str, sampling: Iterator[int | Bank], steps: int, cancel: Cancel) -> Iterator[Phase]:
    for progress in sampling:
        if isinstance(progress, Bank):
            return progress
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        yield Phase(phase, progress, steps)


# ---- learning -----------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the stages came to."""

    best: Vectors
    losses: list[float]
    stages: list[dict[str, Any]]
    stopped: str


def _learn(
    request: EstimateRequest, session: Session, materials: list[Material], start: Vectors, cancel: Cancel
) -> Iterator[Note | StepReport]:
    """Runs the planned stages one after the other, each from the best vectors of the one before."""
    target = materials[0].target
    steady = target.single() is not None
    planned = plan.stages(request, composed=target.composed(), steady=steady)
    if not steady and plan.in_sentences(request, steady=True):
        yield Note("The prompt changes from step to step or has AND, so the embedding is made to be the whole prompt.")
    run = Run(start, [], [], "")
    for stage in planned:
        objective, validate = _objective(request, session, materials, stage)
        if run.stages and stage.part is Part.UNET:  # the stage before was not judged by what the U-Net makes of it
            run.best = min(run.best, start, key=validate)
        stage = stage.sized(start)
        scale = FLOAT16_LOSS_SCALE if session.info.dtype is torch.float16 else 1.0
        fit = Fit(stage, request, objective, run.best, validate, cancel, scale)
        yield from fit.run()
        run.best, run.stopped = fit.best, fit.stopped
        run.losses += fit.losses
        if fit.lightened:
            yield Note("Memory was short, so the U-Net kept less of it at once: slower, with the same result.")
        run.stages.append({**stage.record(), "steps_run": fit.steps_run, "stopped": fit.stopped})
        if cancel.wanted is not None:
            break
    if plan.in_sentences(request, steady=steady):
        run.best = {key: torch.lerp(start[key], rows, SHARE_OF_THE_WAY) for key, rows in run.best.items()}
    return run


def _objective(
    request: EstimateRequest, session: Session, materials: list[Material], stage: Stage
) -> tuple[Objective, Callable[[Vectors], float]]:
    """What a stage minimises, and the error it is judged by."""
    distance = LOSSES[request.loss]
    if plan.in_sentences(request, steady=materials[0].target.single() is not None):
        return _in_sentences(request, session, materials[0], stage.part)

    def objective(m: Material) -> Objective:
        if stage.part is Part.TRANSFORMER:
            return HiddenState(session, m.target, distance)
        if stage.part is Part.CROSS_ATTENTION:
            return CrossAttention(session, m.target, m.queries, distance)
        return Denoising(session, m.target, m.bank, m.checks, distance, request.batch)

    return _together([objective(m) for m in materials]), validator(session, materials, stage.part)


def _together(objectives: list[Objective]) -> Objective:
    return objectives[0] if len(objectives) == 1 else Together(objectives)


def _in_sentences(
    request: EstimateRequest, session: Session, m: Material, part: Part
) -> tuple[Objective, Callable[[Vectors], float]]:
    """The objective over random sentences; judged by its own loss on sentences, and noise, it never draws."""
    checks = distinct(Random(f"checks {request.seed}"), CHECK_SENTENCES, (), session.random_text)
    avoid, generator = [*checks, *report_sentences(request, session)], torch.Generator().manual_seed(request.seed)
    distance, text = LOSSES[request.loss], request.text
    if part is Part.CROSS_ATTENTION:
        objective = InSentences(session, m.target, m.queries, distance, text, avoid)
        drawn = objective.prepared([HOLE, *checks], generator)
    else:
        objective = DenoisingInSentences(session, m.target, m.bank, m.checks, distance, text, avoid)
        drawn = objective.prepared([HOLE, *checks], m.checks, generator)

    def error(vectors: Vectors) -> float:
        with torch.no_grad():
            return float(objective.loss(vectors, drawn))

    return objective, error


def validator(session: Session, materials: list[Material], part: Part) -> Callable[[Vectors], float]:
    """The error that vectors are judged by in a part, on noise that isn't learnt from.

    Cross-attention is judged by its own outputs: a look at the U-Net's would cost more than all steps in between.
    """
    if part is Part.CROSS_ATTENTION:
        together = _together([CrossAttention(session, m.target, m.check_queries, LOSSES["MSE"]) for m in materials])
        drawn = together.draw(torch.Generator(), True)

    @torch.no_grad()
    def error(vectors: Vectors) -> float:
        if part is Part.CROSS_ATTENTION:
            return float(together.loss(vectors, drawn))
        errors = [denoising_error(session, m.checks, m.target.embed(session, vectors)) for m in materials]
        return sum(errors) / len(errors)

    return error


# ---- the number of vectors ----------------------------------------------------------------------------------------

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TRIAL_STEPS = 20


def _start(
    request: EstimateRequest, session: Session, materials: list[Material], cancel: Cancel
) -> Iterator[Phase | Note]:
    """The vectors to start from, and where their number was chosen by trial, the error each number left."""
    if request.vectors != AUTO_VECTORS:
        return initial_vectors(request, session), {}
    most = len(next(iter(initial_vectors(replace(request, vectors="init_text"), session).values())))
    candidates = [*(count for count in COUNTS if count < most), most]
    denoising, errors = validator(session, materials, Part.UNET), {}
    trial = replace(plan.DEFAULTS[Part.CROSS_ATTENTION], steps=TRIAL_STEPS)
    if materials[0].target.composed():
        trial = replace(plan.DEFAULTS[Part.UNET], steps=TRIAL_STEPS // 4)
    for number, count in enumerate(candidates):
        yield Phase("Trying numbers", number, len(candidates))
        start = initial_vectors(replace(request, vectors=count, start=Start.POOLED), session)
        objective, validate = _objective(replace(request, use=Use.WHOLE), session, materials, trial)
        fit = Fit(trial, replace(request, warmup=0), objective, start, validate, cancel)
        for _ in fit.run():
            pass
        errors[count] = denoising(fit.best)
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        if errors[count] <= request.tolerance:
            break
    good = [count for count, error in errors.items() if error <= request.tolerance]
    count = good[0] if good else min(errors, key=errors.get)
    table = ", ".join(f"{n}: {error:.4f}" for n, error in errors.items())
    yield Note(f"{count} vectors are used. Error by number of vectors, after a short trial: {table}.")
    return initial_vectors(replace(request, vectors=count, start=Start.POOLED), session), errors


# ---- after the run ------------------------------------------------------------------------------------------------


def _warnings(
    request: EstimateRequest, session: Session, material: Material, vectors: Vectors, chosen: Sequence[str]
) -> Iterator[Note]:
    """Says before saving in which sentences the embedding would do worse than the prompt without its weights.

    By cross-attention outputs, without the U-Net: it catches what is bad, and sometimes warns of what is not.
    """
    if request.use is Use.WHOLE or material.target.single() is None or material.target.plain is None:
        return
    check = InSentences(session, material.target, material.queries, LOSSES["MSE"], request.text, ())
    check.FLOOR = 1e-4
    drawn = check.prepared([HOLE, *chosen], torch.Generator().manual_seed(request.seed))
    with torch.no_grad():
        shares = check.shares(vectors, drawn)[1:].tolist()
    bad = [sentence for sentence, share in zip(chosen, shares, strict=True) if share > 1]
    if bad:
        yield Note(
            f"In sentences such as {bad[0]!r} the prompt without its weights may come closer than the embedding."
        )


def _measured(
    session: Session, target: Target, request: EstimateRequest, vectors: Vectors, chosen: Sequence[str]
) -> Iterator[Phase]:
    for progress in measure(session, target, request, vectors, chosen):
        if isinstance(progress, Fidelity):
            return progress
        yield Phase(*progress)


def _facts(request: EstimateRequest, info: ModelInfo, run: Run, counts: dict[int, float]) -> dict[str, Any]:
    """What the file remembers of how it was made."""
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "settings": request.record(),
        "stages": run.stages,
        "seed": request.seed,
        "sd_checkpoint_name": info.name,
        "sd_checkpoint": info.hash,
        "step": len(run.losses),
        **({"errors_by_vectors": counts} if counts else {}),
    }


def _record(
    request: EstimateRequest,
    path: Path,
    info: ModelInfo,
    run: Run,
    counts: dict[int, float],
    fidelity: Fidelity,
    seconds: float,
) -> dict[str, Any]:
    return {
        "name": path.stem,
        "file": str(path),
        "format": path.suffix.lower().lstrip("."),
        "prompt": request.prompt,
        "negative": request.negative,
        "vectors": len(next(iter(run.best.values()))),
        "part": request.part.value,
        "use": request.use.value,
        "steps_run": len(run.losses),
        "stages": run.stages,
        "stopped": run.stopped,
        "seconds": seconds,
        "losses": run.losses,
        **fidelity.figures(),
        **({"errors_by_vectors": counts} if counts else {}),
        "seed": request.seed,
        "model": {"name": info.name, "hash": info.hash},
        "settings": request.record(),
    }
