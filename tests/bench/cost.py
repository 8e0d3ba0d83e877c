"""What one learning step costs and where the time goes. Errors don't matter here, so random weights will do.

With one reserve: on random weights the gradient is so small that L-BFGS evaluates the loss once in a step, where it
takes about five on a trained model. So cross-attention is compared by the cost of one evaluation (loss and gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import plan
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import validator
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.objectives.cross_attention import CrossAttention
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.registry import LOSSES
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest, Part, Use
from lib_estimate.target import recording
from lib_estimate.target.bank import Bank
from lib_estimate.target.queries import Queries, Recorder
from lib_estimate.target.recording import Material, materials_of
from lib_estimate.target.target import Target, build_target
from tests.bench.measure import (
    ASIDE,
    CHECKS,
    LOOP,
    OPTIMIZER,
    REST,
    Clock,
    Split,
    Timed,
    drained,
    peak_memory_mb,
    replaced,
    trajectories,
)

PROMPT = "(red:1.6) circle"
LARGE = 100_000_000  # parameters of a U-Net that is slow on a CPU
PEAK_SIZE, PEAK_REPEATS = 8192, 20  # of the matrices that measure a GPU's peak


@dataclass(frozen=True)
class Size:
    """How much is run. The cost of a step doesn't depend on what the latents hold, only on how many there are."""

    sampling_steps: int
    queries: int  # per latent, so that sampling_steps * queries stays the default's
    batch: int
    checks: bool  # whether the validation really runs
    attention_steps: tuple[int, int]  # not measured, measured; multiples of the steps between two checks
    denoising_steps: tuple[int, int]


WHOLE = Size(20, 6, 12, True, (4, 40), (10, 20))
LIGHT = Size(2, 60, 1, False, (1, 2), (1, 2))  # for a large model on a CPU, where one sample takes many seconds


@dataclass(frozen=True)
class Ground:
    """What the measurements run on."""

    session: StandaloneSession
    request: EstimateRequest
    size: Size
    target: Target
    bank: Bank
    queries: Queries

    @property
    def start(self) -> Vectors:
        return initial_vectors(self.request, self.session)


def step_costs(session: StandaloneSession, seed: int) -> dict[str, Any]:
    """All figures of a step, as plain values."""
    ground = _ground(session, seed)
    if session.info.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.info.device)
    distance = LOSSES[ground.request.loss]
    bare: list[float] = []
    denoising = Denoising(session, ground.target, ground.bank, ground.bank, distance, ground.size.batch)
    denoising_cost = _cost(
        ground, Part.UNET, denoising, "U-Net", ground.size.denoising_steps, lambda: bare.append(_bare(ground))
    )
    attention = CrossAttention(session, ground.target, ground.queries, distance)
    attention_cost = _cost(
        ground, Part.CROSS_ATTENTION, attention, "attention layers", ground.size.attention_steps, lambda: None
    )
    sample = fmean(bare[ground.size.denoising_steps[0] :]) / ground.size.batch
    learnt_from = len(denoising.draw(torch.Generator(), fixed=True))
    per_sample = denoising_cost["seconds_per_evaluation"] / learnt_from
    figures = {
        "size": {"sampling_steps": ground.size.sampling_steps, "batch": ground.size.batch},
        "queries_per_layer": [h.shape[0] * h.shape[1] for h in ground.queries.hidden],
        "steps": {"Denoising": denoising_cost, "CrossAttention": attention_cost},
        "bare_seconds_per_sample": sample,
        "denoising_seconds_per_sample": per_sample,
        "denoising_ratio": per_sample / sample,
        "cross_attention_step_ratio": attention_cost["seconds_per_evaluation"] / sample,
        "cross_attention_optimizer_step_ratio": attention_cost["seconds"] / sample,
        "bank_forwards": bank_forwards(session, seed),
        "peak_memory_mb": peak_memory_mb(session.info.device),
    }
    if session.info.device.type == "cuda":
        figures["cuda"] = _cuda(ground, denoising)
    return figures


def bank_forwards(session: StandaloneSession, seed: int) -> int:
    """U-Net samples that a request with every default records from before learning begins. None of them is run."""
    request = EstimateRequest(prompt=PROMPT, name="bench", seed=seed)

    samples: list[int] = []

    def counted(x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        samples.append(len(x))
        return torch.zeros_like(x)

    with replaced(session, "predict_noise", counted):
        drained(materials_of(request, session, build_target(request, session), Cancel()))
    return sum(samples)


def _ground(session: StandaloneSession, seed: int) -> Ground:
    parameters = sum(p.numel() for p in session.parts.unet.parameters())
    size = LIGHT if parameters > LARGE and session.info.device.type == "cpu" else WHOLE
    request = EstimateRequest(
        prompt=PROMPT,
        name="bench",
        use=Use.WHOLE,
        seed=seed,
        sampling_steps=size.sampling_steps,
        queries=size.queries,
        batch=size.batch,
        patience=0,
    )
    target = build_target(request, session)
    recorder = Recorder(size.queries, size.sampling_steps, int(request.memory * 2**30), seed)
    bank = trajectories(session, request, target, 1, plain=False, watch=recorder.see)
    return Ground(session, request, size, target, bank, recorder.queries(bank.step, torch.arange(len(bank))))


# ---- one step -----------------------------------------------------------------------------------------------------


def _cost(
    ground: Ground, part: Part, objective: Objective, network: str, steps: tuple[int, int], aside: Callable[[], None]
) -> dict[str, Any]:
    """Runs the learning loop itself and splits its time; `aside` runs after each measured step, off the clock."""
    unmeasured, measured = steps
    split = Split(Clock(ground.session.info.device))
    fit = split.fit()(
        plan.DEFAULTS[part].sized(ground.start),
        ground.request,
        Timed(objective, split, network),
        ground.start,
        _validation(ground, part),
        Cancel(),
    )
    with split.watching(ground.session, network):
        for number, _ in enumerate(islice(fit.run(), unmeasured + measured), 1):
            if number == unmeasured:
                split.reset()
            with split.during(ASIDE):
                aside()
    return _figures(split, measured, ground.size.checks)


def _validation(ground: Ground, part: Part) -> Callable[[Vectors], float]:
    """The validation of a stage, over as many latents as by default; or a number at no cost."""
    if not ground.size.checks:
        return lambda _: 1.0
    count = recording.CHECKS.count * recording.CHECKS.steps
    b, q = ground.bank, ground.queries
    checks = Bank(*(rows[:count] for rows in (b.x, b.timestep, b.step, b.target, b.empty)), None)
    queries = Queries([hidden[:count] for hidden in q.hidden], q.step[:count], q.asked, q.kept)
    material = Material(ground.target, b, checks, q, queries)
    return validator(ground.session, [material], part)


def _figures(split: Split, steps: int, checked: bool) -> dict[str, Any]:
    seconds = {part: spent / steps for part, spent in split.seconds.items() if part != ASIDE}
    checks = seconds.pop(CHECKS, 0.0)
    step = sum(seconds.values())
    evaluations = split.evaluations / steps
    return {
        "seconds": step,
        "evaluations": evaluations,
        "seconds_per_evaluation": step / evaluations,
        "parts": seconds,
        "checks_seconds": checks if checked else None,
        "loop_overhead": seconds[LOOP] / step,
        "loop_overhead_with_checks": (seconds[LOOP] + checks) / (step + checks) if checked else None,
        # stricter: also reading the prompt, choosing entries and comparing, which a loss does around the networks
        "outside_networks": (seconds[LOOP] + seconds[REST]) / step,
        "optimizer": seconds[OPTIMIZER] / step,
    }


def _bare(ground: Ground) -> float:
    """Seconds of a forward and backward of the U-Net alone, with the batch and the gradient that Denoising has."""
    unet, dtype = ground.session.parts.unet, ground.session.info.dtype
    at = torch.arange(ground.size.batch, device=ground.bank.x.device) % len(ground.bank)
    x, timestep = ground.bank.x[at].to(dtype), ground.bank.timestep[at]
    empty = ground.target.empty.expand(len(x))
    hidden, added = empty.hidden.to(dtype).clone().requires_grad_(True), ground.session.added(x, empty.pooled)
    clock = Clock(ground.session.info.device)
    unet(x, timestep, hidden, **added, return_dict=False)[0].float().square().mean().backward()
    return clock()


# ---- on CUDA ------------------------------------------------------------------------------------------------------


def _cuda(ground: Ground, objective: Denoising) -> dict[str, Any]:
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
