"""The loop: steps an optimizer over the vectors, reports, and keeps the best vectors it has seen.

"Best" is measured by a validation that is never learnt from and stays the same, so a lucky batch does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_estimate.errors import EstimateError
from lib_estimate.files.embedding import Vectors
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.plan import LBFGS, Stage
from lib_estimate.learn.registry import OPTIMIZERS, default_learning_rate, learning_rate_at, make_optimizer
from lib_estimate.progress import Cancel, StepReport
from lib_estimate.request import EstimateRequest

CHECKS = 20  # how often at the most the validation error is measured in a run
HALVINGS = 3  # how often the learning rate is halved where the loss was not a number
LESS_SCALE = 64.0  # what the scale of the loss is divided by where the gradient is too large for float16
WORTHWHILE = 0.995  # an error counts as smaller below this share of the best


@dataclass
class Fit:
    """One stage of learning. After (or during) `run()`: `best`, `best_error`, `losses`, `steps_run`, `stopped`."""

    stage: Stage
    request: EstimateRequest
    objective: Objective
    start: Vectors
    validate: Callable[[Vectors], float]
    cancel: Cancel
    loss_scale: float = 1.0  # keeps float16 gradients from vanishing on their way back; taken out again
    before: Fit | None = None  # another fit, of a loss much like this one, whose L-BFGS goes on in this one

    def __post_init__(self) -> None:
        self.best = {key: rows.detach().clone() for key, rows in self.start.items()}
        self.losses: list[float] = []
        self.steps_run = 0
        self.stopped = "all steps done"
        self._answers: list[tuple[list[Tensor], Tensor, list[Tensor]]] = []  # points, losses, gradients of a step
        self.lightened = False  # whether memory was short, so that it went on with less of it and slower
        self.widened = False  # whether numbers were too large for float16, so that it went on in bfloat16
        self.halvings = 0  # of the learning rate, because the loss was not a number
        self.best_error = self.start_error = self.validate(self.best)
        if not math.isfinite(self.best_error) and self.objective.widen():
            self.widened, self.loss_scale = True, 1.0
            self.best_error = self.start_error = self.validate(self.best)

    def run(self) -> Iterator[StepReport]:
        request, stage, started = self.request, self.stage, time.perf_counter()
        rate_at, entry = rates(stage, request.warmup), OPTIMIZERS[stage.optimizer]
        generator = torch.Generator().manual_seed(request.seed)
        drawn = self.objective.draw(generator, True) if entry.closure else None
        if self._goes_on():
            vectors, optimizer = self.before.vectors, self.before.optimizer
            self._carry_over(optimizer, vectors, drawn)
        else:
            vectors = {key: rows.detach().clone().requires_grad_(True) for key, rows in self.start.items()}
            optimizer = make_optimizer(stage.optimizer, list(vectors.values()), rate_at(0))
        self.vectors, self.optimizer = vectors, optimizer
        average = {key: rows.detach().clone() for key, rows in vectors.items()}
        every, since_better = max(1, math.ceil(stage.steps / CHECKS)), 0
        # Reading a loss off a GPU makes the CPU wait for it, so there it is done only where a check is due anyway.
        report_every = 1 if next(iter(vectors.values())).device.type == "cpu" else every
        pending: list[Tensor] = []

        for step in range(stage.steps):
            # learning rate, one optimizer step
            rate = rate_at(step) / 2**self.halvings
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            if not entry.closure:
                drawn = self.objective.draw(generator, False)
            pending.append(self._optimizer_step(self.optimizer, entry.closure, vectors, drawn))
            _update_average(average, vectors, request.ema)
            self.steps_run = step + 1
            last = step + 1 == stage.steps or self.cancel.wanted is not None
            if (step + 1) % report_every and not last:
                continue

            # losses, validation
            found = torch.stack(pending).tolist()
            pending.clear()
            self.losses += filter(math.isfinite, found)
            if not all(map(math.isfinite, found)):
                if not self._sound_again(step, drawn):
                    break
                for key, rows in self.best.items():
                    average[key].copy_(rows)
                self.optimizer = make_optimizer(stage.optimizer, list(vectors.values()), rate)
                continue
            error = None
            if (step + 1) % every == 0 or last:
                before = self.best_error
                error = self._check(average)
                # While a falling learning rate is high, an error that stays says nothing about where it will end.
                settling = stage.schedule == "constant" or step + 1 > stage.steps / 2
                since_better = 0 if error < WORTHWHILE * before or not settling else since_better + 1
            seconds = time.perf_counter() - started
            left = seconds / (step + 1) * (stage.steps - step - 1)
            part, loss = stage.goal.value, self.losses[-1]
            yield StepReport(
                part, step + 1, stage.steps, loss, rate, seconds, left, error, self.best_error, self.start_error
            )

            # reasons to stop
            if self.cancel.wanted is not None:
                if error is None:
                    self._check(average)
                self.stopped = "interrupted"
                break
            if request.patience and since_better >= request.patience:
                self.stopped = f"the error has not fallen in {since_better * every} steps"
                break

    def _goes_on(self) -> bool:
        """Whether the fit before ended where this one starts, with the optimizer that keeps what it knows."""
        before = self.before
        if before is None or {before.stage.optimizer, self.stage.optimizer} != {LBFGS}:
            return False
        return all(torch.equal(rows, before.vectors[key].detach()) for key, rows in self.start.items())

    def _carry_over(self, optimizer: torch.optim.Optimizer, vectors: Vectors, drawn: Any) -> None:
        """What L-BFGS learnt of the curvature serves for a loss much like the one before. It takes the change of the
        gradient since its last step for curvature, too: so that one begins with the new loss's own gradient."""
        self._closure(optimizer, vectors, drawn)()
        gradient = torch.cat([row.grad.flatten() for row in vectors.values()])
        optimizer.state[next(iter(vectors.values()))]["prev_flat_grad"] = gradient

    def _check(self, vectors: Vectors) -> float:
        """Measures the validation error; the best vectors are kept."""
        error = self.validate(vectors)
        if error < self.best_error:
            self.best_error = error
            self.best = {key: rows.clone() for key, rows in vectors.items()}
        return error

    def _optimizer_step(self, optimizer: torch.optim.Optimizer, closure: bool, vectors: Vectors, drawn: Any) -> Tensor:
        """One step; returns the loss before it, a scalar."""
        if closure:
            return optimizer.step(self._closure(optimizer, vectors, drawn)).detach()
        loss = self._gradients(optimizer, vectors, drawn)
        optimizer.step()
        return loss

    def _closure(self, optimizer: torch.optim.Optimizer, vectors: Vectors, drawn: Any) -> Callable[[], Tensor]:
        """The loss and its gradient for an optimizer that asks for them several times in a step.

        A step begins at the point of the line search that the one before chose, so its first answer is known already.
        """
        rows = list(vectors.values())
        before, self._answers = self._answers, []

        def evaluate() -> Tensor:
            known = (answer for answer in before if all(map(torch.equal, answer[0], rows)))
            answer = None if self._answers else next(known, None)
            if answer is None:
                loss = self._gradients(optimizer, vectors, drawn)
                answer = [row.detach().clone() for row in rows], loss, [row.grad for row in rows]
            self._answers.append(answer)
            for row, gradient in zip(rows, answer[2], strict=True):
                row.grad = gradient
            return answer[1]

        return evaluate

    def _gradients(self, optimizer: torch.optim.Optimizer, vectors: Vectors, drawn: Any) -> Tensor:
        """The loss, a scalar, and its gradient in the vectors."""
        loss = self._backward(optimizer, vectors, drawn)
        rows = list(vectors.values())
        if self.loss_scale != 1:
            for row in rows:
                row.grad /= self.loss_scale
        if self.request.clip_gradient:
            torch.nn.utils.clip_grad_norm_(rows, self.request.clip_gradient)
        return loss

    def _backward(self, optimizer: torch.optim.Optimizer, vectors: Vectors, drawn: Any) -> Tensor:
        """The loss, and its scaled gradient. Where memory runs out, again with less of it at once."""
        while True:
            optimizer.zero_grad()
            loss = torch.zeros((), device=next(iter(vectors.values())).device)
            try:
                for part in self.objective.losses(vectors, drawn):
                    (part * self.loss_scale).backward()
                    loss += part.detach()
                return loss
            except torch.cuda.OutOfMemoryError:
                if not self.objective.lighten():
                    raise
            self.lightened = True
            torch.cuda.empty_cache()

    def _sound_again(self, step: int, drawn: Any) -> bool:
        """The loss was not a number: goes back to the best vectors, from where it is one again, with a lower learning
        rate if that is what it takes; False where nothing is left to try."""
        with torch.no_grad():
            for key, rows in self.best.items():
                self.vectors[key].copy_(rows)
        self._answers.clear()
        too_large = not self._finite_here(drawn)
        while too_large and not self._finite_here(drawn):
            if self.loss_scale > 1:
                self.loss_scale = max(1.0, self.loss_scale / LESS_SCALE)
            elif self.objective.widen():
                self.widened = True
            else:
                return self._stop_as_not_finite(step)
        if too_large:
            return True
        if self.halvings == HALVINGS:
            return self._stop_as_not_finite(step)
        self.halvings += 1
        return True

    def _stop_as_not_finite(self, step: int) -> bool:
        if not math.isfinite(self.best_error):
            raise EstimateError(
                "The loss is not a number from the start: the model gives no usable numbers in this number format. "
                "Use --dtype float32 or bfloat16."
            )
        lower = f", with 1/{2**self.halvings} of the learning rate as well" if self.halvings else ""
        self.stopped = (
            f"the loss was not a number at step {step + 1}{lower}; the best vectors before it were kept. "
            "Use a lower learning rate, or --dtype float32"
        )
        return False

    def _finite_here(self, drawn: Any) -> bool:
        loss = self._gradients(self.optimizer, self.vectors, drawn)
        gradients = torch.cat([rows.grad.flatten() for rows in self.vectors.values()])
        return bool(loss.isfinite() & gradients.isfinite().all())


def rates(stage: Stage, warmup: int) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0."""
    rate = stage.learning_rate or str(default_learning_rate(stage.optimizer))
    return learning_rate_at(rate, stage.schedule, warmup, stage.steps)


@torch.no_grad()
def _update_average(average: Vectors, vectors: Vectors, share: float) -> None:
    """average <- share * average + (1 - share) * vectors; a share of 0 copies."""
    for key, rows in vectors.items():
        average[key].lerp_(rows.detach(), 1 - share)
