"""What the benchmark measures with: a clock, a counter, the course of a run, and where the time of a step goes."""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import Conditioning
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn.fit import Fit
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.request import EstimateRequest
from lib_estimate.target.bank import TRAIN, Bank, build_bank, latent_noise
from lib_estimate.target.target import Target

T = TypeVar("T")


class Clock:
    """Seconds since it was made: of this process's CPU time, or of the wall's with the GPU's work finished."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.start = device, 0.0
        self.start = self()

    def __call__(self) -> float:
        if self.device.type == "cpu":
            return time.process_time() - self.start
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - self.start


def drained(work: Generator[Any, None, T], each: Callable[[Any], None] = lambda _: None) -> T:
    """Runs a generator to its end and returns what it returns."""
    while True:
        try:
            each(next(work))
        except StopIteration as end:
            return end.value


def peak_memory_mb(device: torch.device) -> float | None:
    """Highest use of memory, in MB: on CUDA since the last reset, else of the whole process since its start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# ---- forward-equivalents ------------------------------------------------------------------------------------------


@dataclass
class Count:
    """Latents that went through the U-Net, seen from outside. One backward counts as two forwards."""

    forwards: int = 0
    backwards: int = 0

    @property
    def equivalents(self) -> int:
        return self.forwards + 2 * self.backwards


@contextmanager
def counting(session: StandaloneSession) -> Iterator[Count]:
    """Counts what runs in the session. A backward counts where and when it really happens."""
    count, predict = Count(), session.predict_at_once

    def counted(x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        eps = predict(x, timestep, conditioning)
        count.forwards += len(x)
        if eps.requires_grad:

            def backward(gradient: Tensor) -> None:
                count.backwards += len(gradient)

            eps.register_hook(backward)
        return eps

    with replaced(session, "predict_at_once", counted):
        yield count


@contextmanager
def replaced(session: StandaloneSession, name: str, function: Callable) -> Iterator[None]:
    """Puts a function in front of a method of the session's class. Not to be nested for the same name."""
    setattr(session, name, function)
    try:
        yield
    finally:
        delattr(session, name)


def trajectories(session: StandaloneSession, request: EstimateRequest, target: Target, count: int, **options) -> Bank:
    """Latents that `count` generations under the target pass through, from the noise that is learnt from."""
    noise = latent_noise(request, session, TRAIN, count)
    *_, bank = build_bank(session, target, noise, request.cfg_scale, **options)
    return bank


# ---- the course of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Vectors a run had, and after how many forward-equivalents."""

    forwards: int
    vectors: Vectors


class Course:
    """The points of a run. Taking one costs almost nothing: errors are measured when the run is over."""

    APART = 1.1

    def __init__(self, count: Count) -> None:
        self.count = count
        self.points: list[Point] = []

    def note(self, vectors: Vectors) -> None:
        kept = {key: rows.detach().clone() for key, rows in vectors.items()}
        self.points.append(Point(self.count.equivalents, kept))

    def thinned(self, marks: Sequence[int]) -> list[Point]:
        """What a run had at each of the marks, at each of a row of others that grow by APART, and at its end.

        So an error counts as reached up to a tenth late, never early. Of several points at one time the last counts.
        """
        times, grid = [point.forwards for point in self.points], [1.0]
        while grid[-1] < times[-1]:
            grid.append(self.APART * grid[-1])
        chosen = {max(0, bisect_right(times, at) - 1) for at in (*grid, *marks, times[-1])}
        return [self.points[index] for index in sorted(chosen)]

    def fit(self) -> type[Fit]:
        """The learning loop, which here also notes its best vectors whenever there are better ones."""
        course = self

        class Noted(Fit):
            def __post_init__(self) -> None:
                super().__post_init__()
                course.note(self.best)

            def run(self) -> Iterator[Any]:
                noted = self.best
                for report in super().run():
                    if self.best is not noted:
                        noted = self.best
                        course.note(noted)
                    yield report

        return Noted


# ---- where the time of a step goes --------------------------------------------------------------------------------

LOOP, DRAWING, OPTIMIZER, REST, ASIDE = "loop", "drawing", "optimizer", "rest of the loss", "aside"
TEXT_FORWARD, TEXT_BACKWARD = "text encoder forward", "text encoder backward"


class Split:
    """Charges the time that passes to one part of a step after the other."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.part, self.since = clock, LOOP, clock()
        self.seconds: dict[str, float] = defaultdict(float)
        self.evaluations = 0

    def enter(self, part: str) -> None:
        now = self.clock()
        self.seconds[self.part] += now - self.since
        self.part, self.since = part, now

    def reset(self) -> None:
        """Forgets what was measured so far: the first steps are slower."""
        self.enter(self.part)
        self.seconds.clear()
        self.evaluations = 0

    @contextmanager
    def during(self, part: str) -> Iterator[None]:
        before = self.part
        self.enter(part)
        yield
        self.enter(before)

    def fit(self) -> type[Fit]:
        """The learning loop, which here tells its optimizer's steps from the rest."""
        split = self

        class Timed(Fit):
            def _optimizer_step(self, *arguments: Any) -> float:
                with split.during(OPTIMIZER):
                    return super()._optimizer_step(*arguments)

        return Timed

    @contextmanager
    def watching(self, session: StandaloneSession, network: str) -> Iterator[None]:
        """Tells the networks from the rest of a loss; `network` names what stands behind the text encoder."""
        encode, parts = session.encode, session.parts

        def encoded(*arguments: Any, **options: Any) -> Conditioning:
            conditioning = encode(*arguments, **options)
            if conditioning.hidden.requires_grad:
                # Autograd comes by here when it is through with all that uses the hidden states.
                conditioning.hidden.register_hook(lambda _: self.enter(TEXT_BACKWARD))
            return conditioning

        watched = [(encoder.model, TEXT_FORWARD) for encoder in parts.text_encoders]
        watched += [(parts.unet, f"{network} forward")]
        watched += [(module, f"{network} forward") for module in denoising.attention_modules(session.parts.unet)]
        handles = [handle for module, part in watched for handle in self._hooked(module, part)]
        try:
            with replaced(session, "encode", encoded):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self, module: nn.Module, part: str) -> list[Any]:
        """Hooks that charge a module's forward; a module inside another, or in a check, is part of that."""
        running: list[bool] = []

        def before(*_: Any) -> None:
            running.append(self.part == REST)
            if running[-1]:
                self.enter(part)

        def after(*_: Any) -> None:
            if running.pop():
                self.enter(REST)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


class Timed(Objective):
    """An objective that tells a split when its forward and its backward begin and end."""

    def __init__(self, objective: Objective, split: Split, network: str) -> None:
        self.objective, self.split, self.network = objective, split, network
        self.known: set[int] = set()

    def draw(self, generator: torch.Generator, fixed: bool) -> Any:
        with self.split.during(DRAWING):
            return self.objective.draw(generator, fixed)

    def losses(self, vectors: Vectors, drawn: Any) -> Iterator[Tensor]:
        for rows in vectors.values():
            if id(rows) not in self.known:
                self.known.add(id(rows))
                rows.register_post_accumulate_grad_hook(lambda _: self.split.enter(OPTIMIZER))
        self.split.evaluations += 1
        losses = iter(self.objective.losses(vectors, drawn))
        while True:
            with self.split.during(REST):
                loss = next(losses, None)
            if loss is None:
                return
            loss.register_hook(lambda _: self.split.enter(f"{self.network} backward"))
            yield loss
