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
REMEMBERED = (  # of a fit that stops
    "best_error", "start_error", "losses", "steps_run", "since_better", "lightened", "widened", "halvings",
    "loss_scale",
)  # fmt: skip
NOT_OF_A_FIT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # by what else a file holds
DAMAGED = "What the stopped run left is damaged. Leave --resume out to begin anew."
WORTHWHILE = 0.995  # an error counts as smaller below this share of the best


@dataclass
class Ended:
    """Where a fit ended: what the next stage's may go on with."""

    optimizer_name: str
    vectors: Vectors
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """As plain values and tensors."""
        return {
            "optimizer_name": self.optimizer_name,
            "vectors": _detached(self.vectors),
            "optimizer": self.optimizer.state_dict(),
        }

    @classmethod
    def restored(cls, state: dict[str, Any], like: Vectors) -> Ended:
        """like: vectors on the device where it goes on. EstimateError where it can't be what a fit left."""
        try:
            vectors = _learnable(state["vectors"], like)
            optimizer = make_optimizer(state["optimizer_name"], list(vectors.values()), 1.0)
            optimizer.load_state_dict(state["optimizer"])
            return cls(state["optimizer_name"], vectors, optimizer)
        except NOT_OF_A_FIT as error:
            raise EstimateError(DAMAGED) from error


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
    before: Ended | None = None  # another fit, of a loss much like this one, whose L-BFGS goes on in this one
    keep: Callable[[Fit], None] = lambda fit: None  # told of every point from which it can go on

    def __post_init__(self) -> None:
        self.best = {key: rows.detach().clone() for key, rows in self.start.items()}
        self.losses: list[float] = []
        self.steps_run = 0
        self.stopped = "all steps done"
        self._answers: list[tuple[list[Tensor], Tensor, list[Tensor]]] = []  # points, losses, gradients of a step
        self.lightened = False  # whether memory was short, so that it went on with less of it and slower
        self.widened = False  # whether numbers were too large for float16, so that it went on in bfloat16
        self.halvings = 0  # of the learning rate, because the loss was not a number
        self.since_better = 0  # checks
        self._stopped_at: dict[str, Any] | None = None
        self.best_error = self.start_error = self.validate(self.best)
        if not math.isfinite(self.best_error) and self.objective.widen():
            self.widened, self.loss_scale = True, 1.0
            self.best_error = self.start_error = self.validate(self.best)

    def run(self) -> Iterator[StepReport]:
        request, stage, started = self.request, self.stage, time.perf_counter()
        rate_at, entry = rates(stage, request.warmup), OPTIMIZERS[stage.optimizer]
        self.generator = generator = torch.Generator().manual_seed(request.seed)
        drawn = self.objective.draw(generator, True) if entry.closure else None
        self._begin(rate_at(0), drawn)
        vectors, average, first = self.vectors, self.average, self.steps_run
        every = max(1, math.ceil(stage.steps / CHECKS))
        # Reading a loss off a GPU makes the CPU wait for it, so there it is done only where a check is due anyway.
        report_every = 1 if next(iter(vectors.values())).device.type == "cpu" else every
        pending: list[Tensor] = []

        for step in range(first, stage.steps):
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
                self.since_better = 0 if error < WORTHWHILE * before or not settling else self.since_better + 1
            seconds = time.perf_counter() - started
            left = seconds / (step + 1 - first) * (stage.steps - step - 1)
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
            if request.patience and self.since_better >= request.patience:
                self.stopped = f"the error has not fallen in {self.since_better * every} steps"
                break
            self.keep(self)

    def _begin(self, rate: float, drawn: Any) -> None:
        """Vectors, optimizer and average: new ones, those of the fit before, or as they were when a run stopped."""
        if self._stopped_at is not None:
            self._go_on(self._stopped_at)
            return
        if self._goes_on():
            self.vectors, self.optimizer = self.before.vectors, self.before.optimizer
            self._carry_over(self.optimizer, self.vectors, drawn)
        else:
            self.vectors = {key: rows.detach().clone().requires_grad_(True) for key, rows in self.start.items()}
            self.optimizer = make_optimizer(self.stage.optimizer, list(self.vectors.values()), rate)
        self.average = _detached(self.vectors)

    # ---- to go on in another process ----

    def ended(self) -> Ended:
        return Ended(self.stage.optimizer, self.vectors, self.optimizer)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as plain values and tensors."""
        rows = list(self.vectors.values())
        return {
            **self.ended().state(),
            **{name: getattr(self, name) for name in REMEMBERED},
            "best": self.best,
            "average": self.average,
            "generator": self.generator.get_state(),
            # L-BFGS begins its next step with the answer it has for this point.
            "answers": [answer for answer in self._answers if all(map(torch.equal, answer[0], rows))][:1],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """`run` goes on from what `state` said. EstimateError where that can't be of this stage."""
        kinds = {name: type(getattr(self, name)) for name in REMEMBERED}
        wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
        if wrong or not 0 < state["steps_run"] < self.stage.steps or state["optimizer_name"] != self.stage.optimizer:
            raise EstimateError(DAMAGED)
        self._stopped_at = state
        for name in REMEMBERED:
            setattr(self, name, state[name])
        if self.widened:
            self.objective.widen()

    def _go_on(self, state: dict[str, Any]) -> None:
        ended = Ended.restored(state, self.start)
        self.vectors, self.optimizer = ended.vectors, ended.optimizer
        device = next(iter(self.start.values())).device
        try:
            self.average, self.best = (
                {k: v.to(device) for k, v in state[name].items()} for name in ("average", "best")
            )
            self.generator.set_state(state["generator"])
            self._answers = [
                ([point.to(device) for point in points], loss.to(device), [row.to(device) for row in gradient])
                for points, loss, gradient in state["answers"]
            ]
        except NOT_OF_A_FIT as error:
            raise EstimateError(DAMAGED) from error

    def _goes_on(self) -> bool:
        """Whether the fit before ended where this one starts, with the optimizer that keeps what it knows."""
        before = self.before
        if before is None or {before.optimizer_name, self.stage.optimizer} != {LBFGS}:
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


def _detached(vectors: Vectors) -> Vectors:
    return {key: rows.detach().clone() for key, rows in vectors.items()}


def _learnable(vectors: Vectors, like: Vectors) -> Vectors:
    """Copies to learn, in the order and on the devices of others."""
    return {key: vectors[key].detach().to(rows.device, copy=True).requires_grad_(True) for key, rows in like.items()}


@torch.no_grad()
def _update_average(average: Vectors, vectors: Vectors, share: float) -> None:
    """average <- share * average + (1 - share) * vectors; a share of 0 copies."""
    for key, rows in vectors.items():
        average[key].lerp_(rows.detach(), 1 - share)
