"""What a run is planned to cost, held against what a session counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import groupby, pairwise

import pytest

from lib_estimate import words
from lib_estimate.interfaces.time_left import TimeLeft
from lib_estimate.progress import Cost, Note, Phase, Planned, StepReport
from lib_estimate.request import Effort, EstimateRequest, Target, Use

SECONDS = 0.3  # of a forward
LINE_SEARCH = 0.1  # share of a learning phase that L-BFGS's line search may take more or less
SHORT = EstimateRequest(
    prompt="a (red:1.6) circle", name="counted", effort=Effort.QUICK, use=Use.WHOLE, sampling_steps=4, images=0, steps=3
)
REQUESTS = {
    "whole": dataclasses.replace(SHORT, effort=Effort.NORMAL, images=1),
    "anywhere": dataclasses.replace(SHORT, use=Use.ANYWHERE, negative="blurry"),
    "and": dataclasses.replace(SHORT, prompt="a (red:1.3) circle AND a green square :0.6"),
    "both": dataclasses.replace(SHORT, target=Target.BOTH, negative="(blue:1.4) square"),
}


@dataclass
class Seen:
    """A run as it was told: each progress with the forwards that had been counted by then."""

    plan: Planned
    moves: list[tuple[str, float, int]]  # phase, share of it, forwards
    spent: int
    went_back: bool


def seen(request: EstimateRequest, host) -> Seen:
    plan, moves, went_back = None, [], False
    for progress in words.estimate(request, host):
        if isinstance(progress, Planned):
            plan = progress
        elif isinstance(progress, Phase):
            moves.append((progress.name, progress.done / progress.total, plan.spent()))
        elif isinstance(progress, StepReport):
            moves.append((f"Learning ({progress.part})", progress.step / progress.steps, plan.spent()))
        elif isinstance(progress, Note):
            went_back = went_back or any(said in progress.text for said in ("of the way", "kept", "alone."))
    return Seen(plan, moves, plan.spent(), went_back)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_plan_is_what_a_session_counts_and_the_time_left_is_honest(name, host, tmp_path) -> None:
    run = seen(dataclasses.replace(REQUESTS[name], out=str(tmp_path)), host)
    phases = [phase for phase, _ in groupby(phase for phase, _, _ in run.moves)]
    if not run.went_back:
        assert phases == [cost.phase for cost in run.plan.costs]
    counted = [*begins(run), run.spent]
    # A phase is first heard of when some of it is done: of learning with the U-Net, with an evaluation more or less.
    off = 16 if any("unet" in phase for phase in phases) else 10
    for cost, (before, after) in zip(run.plan.costs, pairwise(counted), strict=False):
        if not (run.went_back and cost.phase in ("Noise", "Pictures (embedding)")):
            assert after - before == pytest.approx(cost.forwards, rel=LINE_SEARCH, abs=off), cost
    if not run.went_back:
        assert run.spent == pytest.approx(sum(cost.forwards for cost in run.plan.costs), rel=0.05)
    check_time(run)


def begins(run: Seen) -> list[int]:
    """What each phase of the plan began at. The first that is heard of one is that some of it is done."""
    costs, out = iter(run.plan.costs), []
    for _, moves in groupby(run.moves, lambda move: move[0]):
        _, share, spent = next(moves)
        cost = next(costs, None)
        out += [] if cost is None else [spent - round(share * cost.forwards)]
    return out


def check_time(run: Seen) -> None:
    """Plays the run again with a clock on which only the U-Net and the losses beside it take time."""
    now, left, fractions, aside = 0.0, [], [], {cost.phase: cost.aside for cost in run.plan.costs}
    spent = 0
    time = TimeLeft(lambda: now)
    time.begin(Planned(run.plan.costs, lambda: spent))
    before: tuple[str, float] = "", 0.0
    for phase, share, forwards in run.moves:
        now += SECONDS * (forwards - spent)
        now += SECONDS * aside.get(phase, 0) * (share - (before[1] if before[0] == phase else 0))
        spent, before = forwards, (phase, share)
        time.move(phase, share)
        fractions.append(time.fraction)
        if phase != run.plan.costs[0].phase:
            left.append((now, time.left()))
    end = now + SECONDS * (run.spent - spent)
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.6
    if not run.went_back:
        assert all(said == pytest.approx(end - at, rel=0.2, abs=0.02 * end) for at, said in left)


def test_a_pace_is_measured_and_not_what_was_planned() -> None:
    """A model whose losses beside the U-Net take five times as long as it is planned."""
    now, spent = 0.0, 0
    time = TimeLeft(lambda: now)
    time.begin(Planned((Cost("Recording", 10), Cost("Learning (sketch)", 0, 20.0), Cost("Noise", 10)), lambda: spent))
    assert time.left() is None
    for step in range(1, 11):
        now, spent = now + 2.0, spent + 1
        time.move("Recording", step / 10)
    assert time.left() == pytest.approx(40 + 20)
    for step in range(1, 11):
        now += 20.0
        time.move("Learning (sketch)", step / 20)
    assert time.left() == pytest.approx(200 + 20)
    fraction = time.fraction
    time.move("Noise", 0)  # it stopped early
    assert time.left() == pytest.approx(20)
    assert time.fraction > fraction
