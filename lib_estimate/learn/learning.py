"""The stages of a plan, one after the other, each from the best vectors of the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Session
from lib_estimate.learn import plan
from lib_estimate.learn.fit import Fit
from lib_estimate.learn.objectives.base import Objective, Together
from lib_estimate.learn.objectives.cross_attention import CrossAttention, InSentences
from lib_estimate.learn.objectives.denoising import Denoising, DenoisingInSentences
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.learn.plan import Stage
from lib_estimate.learn.registry import LOSSES
from lib_estimate.progress import Cancel, Note, StepReport
from lib_estimate.report.fidelity import report_sentences
from lib_estimate.request import HOLE, EstimateRequest, Part
from lib_estimate.target.error import denoising_error
from lib_estimate.target.recording import Material
from lib_estimate.target.sentences import distinct

CHECK_SENTENCES = 8
# Vectors learnt in random sentences go too far for some that weren't drawn. Held back, they lose little alone.
SHARE_OF_THE_WAY = 0.65
FLOAT16_LOSS_SCALE = 4096.0


@dataclass
class Run:
    """What the stages came to."""

    best: Vectors
    losses: list[float]
    stages: list[dict[str, Any]]
    stopped: str


def learn(
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
        objective, validate = objective_of(request, session, materials, stage)
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


def objective_of(
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
