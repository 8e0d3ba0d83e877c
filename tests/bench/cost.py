"""What one learning step costs and where the time goes. Errors don't matter here, so random weights will do.

With one reserve: on random weights the gradient is so small that L-BFGS stops at once. So on a large model Adam makes
the steps, with one evaluation (loss and gradient) each, and that is what objectives are compared by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import plan
from lib_estimate.learn.fit import CHECKS
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import ANCHORS, Lessons
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.objectives.sketch import Layer, Sketched, sketched
from lib_estimate.learn.plan import Goal, Stage
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.target import recording
from lib_estimate.target.queries import Queries, Recorder
from lib_estimate.target.recording import Material
from lib_estimate.target.target import build_target
from tests.bench.measure import (
    ASIDE,
    LOOP,
    OPTIMIZER,
    REST,
    Clock,
    Split,
    Timed,
    peak_memory_mb,
    trajectories,
)

PROMPT = "(red:1.6) circle"
DEFAULT = EstimateRequest(prompt=PROMPT, name="bench")
LARGE = 100_000_000  # parameters of a U-Net that is slow on a CPU
PEAK_SIZE, PEAK_REPEATS = 8192, 20  # of the matrices that measure a GPU's peak
UNET, ATTENTION, SKETCH, SENTENCES = "unet", "cross-attention", "sketch", "sketch in sentences"


class Kind(NamedTuple):
    """An objective that is measured: its stage, the use it is for, and what stands behind the text encoder in it."""

    stage: Stage
    use: Use
    network: str

    def runs_the_unet(self) -> bool:
        return self.stage.goal in plan.RUNS_THE_UNET


KINDS = {
    UNET: Kind(plan.DEFAULTS[Part.UNET], Use.WHOLE, "U-Net"),
    ATTENTION: Kind(plan.DEFAULTS[Part.CROSS_ATTENTION], Use.WHOLE, "attention layers"),
    SKETCH: Kind(plan.SKETCH, Use.WHOLE, "attention layers"),
    SENTENCES: Kind(plan.SKETCH_IN_SENTENCES, Use.ANYWHERE, "attention layers"),
}


def kind_of(goal: str, use: Use) -> str | None:
    """Which of these an evaluation of a stage costs, beside the U-Net's own forwards; None for nothing else."""
    if goal in (Goal.SKETCH, Goal.NOISE_AND_SKETCH):
        return SENTENCES if use is Use.ANYWHERE else SKETCH
    return ATTENTION if goal == Goal.CROSS_ATTENTION else None


@dataclass(frozen=True)
class Size:
    """How much is run. The cost of a step doesn't depend on what the latents hold, only on how many there are."""

    sampling_steps: int
    queries: int  # per latent, so that sampling_steps * queries stays the default's
    batch: int
    checks: bool  # whether the check by the U-Net is measured
    steps: tuple[int, int]  # not measured, measured
    unet_steps: tuple[int, int]  # the same where the U-Net runs
    sketched: int | None  # latents that are really sketched; None: all


WHOLE = Size(20, 6, 12, True, (4, 20), (10, 20), None)
LIGHT = Size(2, 60, 1, False, (1, 3), (1, 1), 1)  # for a large model on a CPU, where one latent takes many seconds


@dataclass(frozen=True)
class Ground:
    """What the measurements run on."""

    session: StandaloneSession
    request: EstimateRequest
    size: Size
    material: Material

    @property
    def start(self) -> Vectors:
        return initial_vectors(self.request, self.session)

    def lessons(self, use: Use) -> Lessons:
        """The program's own objectives, over as much as they have by default."""
        lessons = Lessons(replace(self.request, use=use), self.session, [self.material])
        lessons.sketches.append(default_sketch(lessons, run=self.size.sketched))
        return lessons


def step_costs(session: StandaloneSession, seed: int) -> dict[str, Any]:
    """All figures of a step, as plain values."""
    ground = _ground(session, seed)
    if session.info.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.info.device)
    steps, bare = {}, []
    lessons = {use: ground.lessons(use) for use in (Use.WHOLE, Use.ANYWHERE)}
    for name, kind in KINDS.items():
        clock = Clock(session.info.device)
        objective, validate = lessons[kind.use].of(_as_run(kind.stage, ground))
        setup = clock()
        aside = (lambda: bare.append(_bare(ground))) if kind.runs_the_unet() else (lambda: None)
        steps[name] = _cost(ground, kind, objective, aside) | {"setup_seconds": setup, "check_seconds": None}
        if not kind.runs_the_unet() or ground.size.checks:
            _with_checks(steps[name], kind.stage, _timed(ground, lambda v=validate: v(ground.start)))
        if kind.runs_the_unet():
            denoising = objective
    skipped = ground.size.unet_steps[0]
    forward, both = (fmean(seconds[skipped:]) / ground.size.batch for seconds in zip(*bare, strict=True))
    for step in steps.values():
        step["forwards_per_evaluation"] = step["seconds_per_evaluation"] / forward
        step["forwards_per_setup"] = step["setup_seconds"] / forward
        step["forwards_per_check"] = None if step["check_seconds"] is None else step["check_seconds"] / forward
    latents = len(denoising.draw(torch.Generator(), fixed=True))
    figures = {
        "size": {"sampling_steps": ground.size.sampling_steps, "batch": ground.size.batch, "latents": latents},
        "queries_per_layer": [h.shape[0] * h.shape[1] for h in ground.material.queries.hidden],
        "steps": steps,
        "forward_seconds": forward,
        "with_gradient_ratio": both / forward,
        "denoising_ratio": steps[UNET]["seconds_per_evaluation"] / latents / both,
        "decode_forwards": _timed(ground, lambda: session.decode(ground.material.bank.x[:1])) / forward,
        "peak_memory_mb": peak_memory_mb(session.info.device),
    }
    if session.info.device.type == "cuda":
        figures["cuda"] = _cuda(ground, denoising)
    return figures


# ---- what is run --------------------------------------------------------------------------------------------------


def _ground(session: StandaloneSession, seed: int) -> Ground:
    size = LIGHT if is_large(session) and session.info.device.type == "cpu" else WHOLE
    request = replace(
        DEFAULT,
        use=Use.WHOLE,
        seed=seed,
        sampling_steps=size.sampling_steps,
        queries=size.queries,
        batch=size.batch,
        patience=0,
    )
    target = build_target(request, session)
    recorder = Recorder(size.queries, size.sampling_steps, int(request.memory * 2**30) // 2, seed)
    bank = trajectories(session, request, target, 1, plain=False, watch=recorder.see)
    queries = recorder.queries(bank.step, torch.arange(len(bank)))
    count = latents(recording.checks(DEFAULT))
    few = max(1, count * DEFAULT.queries // size.queries)
    checked = Queries([hidden[:few] for hidden in queries.hidden], queries.step[:few], queries.asked, queries.kept)
    checks = bank.at(spread(count, len(bank)))
    return Ground(session, request, size, Material(session, target, bank, checks, queries, checked))


def is_large(session: StandaloneSession) -> bool:
    return sum(p.numel() for p in session.parts.unet.parameters()) > LARGE


def latents(what: recording.Recording) -> int:
    """Noisy latents that are recorded."""
    return what.count * what.steps * len(what.offsets)


def spread(count: int, available: int) -> Tensor:
    """`count` of `available` indices, each more than once where there are fewer."""
    return (torch.arange(count) * available // count) if count <= available else torch.arange(count) % available


def default_sketch(lessons: Lessons, run: int | None = None) -> Sketched:
    """A sketch as large as by default. Of `run` latents, all of the bank's where None; where by default it is of more,
    each stands in it several times."""
    material, request = lessons.materials[0], lessons.request
    count = ANCHORS[request.effort] if lessons.in_sentences else latents(recording.recording(DEFAULT))
    taken = sum(hidden.nbytes for hidden in (*material.queries.hidden, *material.check_queries.hidden))
    run = min(count, run or len(material.bank))
    bank, budget = material.bank.at(torch.arange(run)), (request.memory * 2**30 - taken) * run / count
    given = [material.target.single()] * run
    *_, once = sketched(lessons.session, given, bank.x, bank.timestep, budget, request.seed)
    again = spread(count, run).to(bank.x.device)
    layers = [Layer(layer.hidden[again], layer.gradient[again], layer.side) for layer in once.layers]
    return Sketched(layers, None if once.pooled is None else once.pooled[again], given[:1] * count)


def _as_run(stage: Stage, ground: Ground) -> Stage:
    """The stage over as many latents as are run; on a large model with Adam, see above."""
    stage = replace(stage, latents=min(stage.latents, ground.size.batch))
    return replace(stage, optimizer="Adam", learning_rate="1e-4") if is_large(ground.session) else stage


# ---- one step -----------------------------------------------------------------------------------------------------


def _cost(ground: Ground, kind: Kind, objective: Objective, aside: Callable[[], None]) -> dict[str, Any]:
    """Runs the learning loop itself, but for its checks, and splits its time; `aside` runs after each step, off the
    clock."""
    unmeasured, measured = ground.size.unet_steps if kind.runs_the_unet() else ground.size.steps
    split = Split(Clock(ground.session.info.device))
    fit = split.fit()(
        _as_run(kind.stage, ground).sized(ground.start),
        ground.request,
        Timed(objective, split, kind.network),
        ground.start,
        lambda _: 1.0,
        Cancel(),
    )
    with split.watching(ground.session, kind.network):
        for number, _ in enumerate(islice(fit.run(), unmeasured + measured), 1):
            if number == unmeasured:
                split.reset()
            with split.during(ASIDE):
                aside()
    seconds = {part: spent / measured for part, spent in split.seconds.items() if part != ASIDE}
    step, evaluations = sum(seconds.values()), split.evaluations / measured
    return {
        "seconds": step,
        "evaluations": evaluations,
        "seconds_per_evaluation": step / evaluations,
        "parts": seconds,
        "loop_overhead": seconds[LOOP] / step,
        # stricter: also reading the prompt, choosing entries and comparing, which a loss does around the networks
        "outside_networks": (seconds[LOOP] + seconds[REST]) / step,
        "optimizer": seconds[OPTIMIZER] / step,
    }


def _with_checks(cost: dict[str, Any], stage: Stage, seconds: float) -> None:
    """Adds what a check of the vectors costs, and its share of a step: there are CHECKS of them in a stage."""
    per_step = seconds * min(CHECKS, stage.steps) / stage.steps
    step = cost["seconds"]
    cost["check_seconds"] = seconds
    cost["loop_overhead_with_checks"] = (cost["loop_overhead"] * step + per_step) / (step + per_step)


def _timed(ground: Ground, work: Callable[[], Any]) -> float:
    clock = Clock(ground.session.info.device)
    work()
    return clock()


def _bare(ground: Ground) -> tuple[float, float]:
    """Seconds of the U-Net alone, with Denoising's batch: a forward, and one with the gradient that Denoising takes."""
    unet, dtype, material = ground.session.parts.unet, ground.session.info.dtype, ground.material
    bank = material.bank.at(spread(ground.size.batch, len(material.bank)))
    empty = material.target.empty.expand(len(bank))
    x, hidden = bank.x.to(dtype), empty.hidden.to(dtype)
    added = ground.session.added(x, empty.pooled)

    def forward(hidden: Tensor) -> Tensor:
        return unet(x, bank.timestep, hidden, **added, return_dict=False)[0].float().square().mean()

    with torch.no_grad():
        alone = _timed(ground, lambda: forward(hidden))
    learnt = hidden.clone().requires_grad_(True)
    return alone, _timed(ground, lambda: forward(learnt).backward())


# ---- on CUDA ------------------------------------------------------------------------------------------------------


def _cuda(ground: Ground, objective: Objective) -> dict[str, Any]:
    """Arithmetic per second of a Denoising step, and as a share of what this card really reaches."""
    from torch.utils.flop_counter import FlopCounterMode

    vectors = {key: rows.clone().requires_grad_(True) for key, rows in ground.start.items()}
    drawn = objective.draw(torch.Generator().manual_seed(0), False)
    optimizer = torch.optim.Adam(list(vectors.values()), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        objective.loss(vectors, drawn).backward()
        optimizer.step()

    with FlopCounterMode(display=False) as counter:
        step()
    seconds, peak = _repeated(step, ground.session.info.device, 10), _peak_flops(ground.session.info.device)
    achieved = counter.get_total_flops() / seconds
    return {
        "flops_per_step": counter.get_total_flops(),
        "seconds_per_step": seconds,
        "flops_per_second": achieved,
        "peak_flops_per_second": peak,
        "share_of_peak": achieved / peak,
    }


def _peak_flops(device: torch.device) -> float:
    """Of a large float16 matrix product."""
    a, b = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device, dtype=torch.float16) for _ in range(2))
    return 2 * PEAK_SIZE**3 / _repeated(lambda: a @ b, device, PEAK_REPEATS)


def _repeated(work: Callable[[], Any], device: torch.device, times: int) -> float:
    """Seconds of one call among many in a row, after a few that don't count."""
    for _ in range(3):
        work()
    clock = Clock(device)
    for _ in range(times):
        work()
    return clock() / times
