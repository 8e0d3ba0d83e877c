from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lib_estimate.errors import EstimateError
from lib_estimate.learn.fit import Fit, rates
from lib_estimate.learn.objectives.base import Objective
from lib_estimate.learn.plan import Stage
from lib_estimate.learn.registry import available_optimizers, default_learning_rate, make_optimizer
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest, Part

GOAL = torch.linspace(-0.4, 0.4, 24).view(3, 8)
BASE = EstimateRequest(prompt="x", name="x")
STAGE = Stage(Part.UNET, "Adam", "0.01", "cosine", 60)


class Bowl(Objective):
    """Distance to a known goal: the loop's own behaviour shows without a model."""

    def __init__(self, noise: float = 0.0, broken_from: int | None = None) -> None:
        self.noise, self.broken_from, self.calls = noise, broken_from, 0

    def draw(self, generator, fixed):
        return torch.randn(GOAL.shape, generator=generator)

    def losses(self, vectors, entries):
        self.calls += 1
        loss = (vectors["clip_l"] - GOAL - self.noise * entries).square().mean() / GOAL.square().mean()
        yield loss * math.nan if self.broken_from is not None and self.calls > self.broken_from else loss


def error(vectors) -> float:
    return float((vectors["clip_l"] - GOAL).square().mean() / GOAL.square().mean())


def make(stage: Stage = STAGE, request: EstimateRequest = BASE, objective: Bowl | None = None, **other) -> Fit:
    start = {"clip_l": other.get("start", torch.zeros_like(GOAL))}
    validate, cancel = other.get("validate", error), other.get("cancel", Cancel())
    return Fit(stage, request, objective or Bowl(), start, validate, cancel)


@pytest.mark.parametrize("optimizer", available_optimizers())
def test_every_offered_optimizer_learns(optimizer) -> None:
    fit = make(replace(STAGE, optimizer=optimizer, learning_rate="", steps=300))
    reports = list(fit.run())
    assert fit.best_error < 0.2, (fit.best_error, len(reports))


def test_reports_tell_where_the_run_is() -> None:
    fit = make()
    reports = list(fit.run())
    assert [r.step for r in reports] == list(range(1, 61))
    assert all(r.steps == 60 and r.seconds_left >= 0 for r in reports)
    assert reports[-1].seconds_left == 0
    assert [r.step for r in reports if r.error is not None] == list(range(3, 61, 3))
    assert fit.losses == [r.loss for r in reports]
    assert fit.steps_run == 60


def test_the_best_vectors_are_kept_not_the_last() -> None:
    stage = replace(STAGE, learning_rate="0.02:30, 5", schedule="constant")
    fit = make(stage, replace(BASE, patience=0))
    reports = list(fit.run())
    assert reports[-1].error > 10 * fit.best_error
    assert error(fit.best) == pytest.approx(fit.best_error)


def test_the_start_is_kept_when_nothing_is_better() -> None:
    fit = make(start=GOAL.clone())
    list(fit.run())
    assert torch.equal(fit.best["clip_l"], GOAL)


def test_it_stops_when_the_error_no_longer_falls() -> None:
    fit = make(replace(STAGE, steps=3000, learning_rate="0.05", schedule="constant"), replace(BASE, patience=3))
    list(fit.run())
    assert fit.steps_run < 3000
    assert "not fallen" in fit.stopped


def test_a_falling_learning_rate_has_half_the_run_to_show_what_it_leads_to() -> None:
    for schedule, stop in (("cosine", 10 + 3), ("constant", 3)):
        fit = make(replace(STAGE, steps=20, schedule=schedule), replace(BASE, patience=3), start=GOAL.clone())
        list(fit.run())
        assert fit.steps_run == stop
        assert fit.stopped == "the error has not fallen in 3 steps"


def test_patience_zero_runs_to_the_end() -> None:
    fit = make(replace(STAGE, steps=400, learning_rate="0.1"), replace(BASE, patience=0))
    list(fit.run())
    assert fit.steps_run == 400


def test_cancel_keeps_the_best_and_measures_it() -> None:
    cancel = Cancel()
    fit = make(cancel=cancel)
    for report in fit.run():
        if report.step == 7:
            cancel.save()
    assert fit.steps_run == 7
    assert fit.best_error == error(fit.best) < 1
    assert fit.stopped == "interrupted"


def test_cancel_while_idle_does_not_stop_the_next_run() -> None:
    Cancel().save()
    fit = make()
    list(fit.run())
    assert fit.steps_run == 60


def test_a_loss_that_is_not_a_number_keeps_what_was_learnt() -> None:
    fit = make(objective=Bowl(broken_from=40))
    list(fit.run())
    assert fit.best_error < 1
    assert torch.isfinite(fit.best["clip_l"]).all()
    assert "not a number" in fit.stopped


class Cliff(Bowl):
    """No number beyond a distance from the start, where too high a learning rate leads."""

    def __init__(self, edge: float) -> None:
        super().__init__()
        self.edge = edge

    def losses(self, vectors, entries):
        beyond = bool(vectors["clip_l"].detach().abs().max() > self.edge)
        for loss in super().losses(vectors, entries):
            yield loss * math.nan if beyond else loss


@pytest.mark.parametrize(("optimizer", "rate"), [("SGD", "3"), ("Adam", "0.4"), ("LBFGS", "8")])
def test_where_the_loss_is_no_number_half_the_learning_rate_goes_on(optimizer, rate) -> None:
    stage = replace(STAGE, optimizer=optimizer, learning_rate=rate, schedule="constant")
    fit = make(replace(stage, steps=200), replace(BASE, patience=0), Cliff(edge=0.6))
    reports = list(fit.run())
    assert 1 <= fit.halvings <= 3
    assert fit.steps_run == 200
    assert reports[-1].learning_rate == reports[0].learning_rate / 2**fit.halvings
    assert fit.best_error < 0.3
    assert all(map(math.isfinite, fit.losses))


def test_three_times_is_enough() -> None:
    fit = make(replace(STAGE, learning_rate="10", schedule="constant"), replace(BASE, patience=0), Cliff(edge=0.5))
    list(fit.run())
    assert fit.halvings == 3
    assert "with 1/8 of the learning rate" in fit.stopped
    assert torch.equal(fit.best["clip_l"], torch.zeros_like(GOAL))
    assert fit.steps_run < 20


def test_a_gradient_too_large_for_float16_is_scaled_less() -> None:
    class Half(Bowl):
        """Its gradient passes through float16, where it is infinite with the whole scale."""

        def losses(self, vectors, entries):
            passed = vectors["clip_l"] * 1.0
            passed.register_hook(lambda gradient: gradient.half().float())
            yield from super().losses({"clip_l": passed}, entries)

    fit = make(objective=Half())
    fit.loss_scale = 2.0**20
    list(fit.run())
    assert fit.loss_scale == 2.0**14
    assert fit.halvings == 0
    assert fit.best_error < 0.2


def test_a_model_that_gives_no_numbers_is_said() -> None:
    fit = make(objective=Bowl(broken_from=0), validate=lambda _: math.nan)
    with pytest.raises(EstimateError, match="float32"):
        list(fit.run())


def test_a_seed_repeats_a_run() -> None:
    def losses(seed: int) -> list[float]:
        fit = make(request=replace(BASE, seed=seed), objective=Bowl(noise=0.1))
        list(fit.run())
        return fit.losses

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_lbfgs_asks_for_no_loss_twice_and_goes_the_same_way() -> None:
    class Valley(Bowl):
        """Steep one way and flat the other, so that every step searches along its line."""

        def __init__(self) -> None:
            super().__init__()
            self.points: list[torch.Tensor] = []

        def losses(self, vectors, entries):
            self.points.append(vectors["clip_l"].detach().clone())
            off = (vectors["clip_l"] - GOAL) * torch.logspace(-1, 1, GOAL.numel()).view_as(GOAL)
            yield (off.square() + off**4).sum()

    stage = replace(STAGE, optimizer="LBFGS", learning_rate="1", schedule="constant", steps=5)
    ours, theirs, vectors = Valley(), Valley(), torch.zeros_like(GOAL).requires_grad_(True)
    *_, last = make(stage, replace(BASE, warmup=0), ours).run()
    optimizer = make_optimizer("LBFGS", [vectors], 1.0)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = theirs.loss({"clip_l": vectors}, None)
        loss.backward()
        return loss

    losses = [optimizer.step(evaluate).item() for _ in range(stage.steps)]
    assert last.loss == pytest.approx(losses[-1])
    assert len(theirs.points) - len(ours.points) == stage.steps - 1
    assert len({tuple(point.flatten().tolist()) for point in ours.points}) == len(ours.points)


def test_ema_smooths_a_noisy_run() -> None:
    stage = replace(STAGE, steps=200, learning_rate="0.1", schedule="constant")

    def last_error(ema: float) -> float:
        *_, last = make(stage, replace(BASE, ema=ema, patience=0), Bowl(noise=0.5)).run()
        return last.error

    assert last_error(0.9) < last_error(0.0)


def test_the_gradient_can_be_limited() -> None:
    moved = []
    for limit in (0.0, 1e-6):
        stage = replace(STAGE, optimizer="SGD", learning_rate="0.1", steps=1)
        fit = make(stage, replace(BASE, clip_gradient=limit))
        list(fit.run())
        moved.append(fit.best["clip_l"].norm().item())
    assert moved[1] < 1e-3 * moved[0]


def test_the_learning_rate_follows_the_stage() -> None:
    rate = rates(replace(STAGE, learning_rate="0.1", steps=100), warmup=10)
    assert rate(0) < rate(9)
    assert rate(99) < 0.01
    steps = rates(replace(STAGE, learning_rate="0.005:10, 1e-3", schedule="constant", steps=100), warmup=0)
    assert steps(0) == 0.005
    assert steps(50) == 1e-3
    assert rates(replace(STAGE, learning_rate=""), warmup=0)(0) == default_learning_rate("Adam")
