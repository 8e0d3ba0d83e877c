from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lib_estimate.learn import plan
from lib_estimate.learn.plan import Goal
from lib_estimate.request import Effort, EstimateRequest, Part, Use
from lib_estimate.target.recording import checks, recording

BASE = EstimateRequest(prompt="a (red:1.6) circle", name="x")


def parts(request: EstimateRequest, composed: bool = False, steady: bool = True) -> list[str]:
    return [f"{s.goal.value} {s.optimizer}" for s in plan.stages(request, composed=composed, steady=steady)]


def test_auto_learns_over_sentences_unless_told_where_the_word_stands() -> None:
    assert parts(BASE) == ["sketch Adam"]
    whole = ["cross-attention LBFGS", "sketch LBFGS", "unet and sketch LBFGS"]
    assert parts(replace(BASE, use=Use.WHOLE)) == whole
    assert parts(replace(BASE, use=Use.SENTENCE, sentence=("a {}",))) == whole


def test_auto_takes_what_can_follow_the_prompt() -> None:
    assert parts(BASE, composed=True, steady=False) == ["unet LBFGS"]
    assert parts(BASE, steady=False) == ["cross-attention LBFGS", "sketch LBFGS", "unet and sketch LBFGS"]


def test_effort_says_how_much_the_unet_is_run() -> None:
    stages = {
        effort: plan.stages(replace(BASE, use=Use.WHOLE, effort=effort), composed=False, steady=True)
        for effort in Effort
    }
    assert [stage.goal for stage in stages[Effort.QUICK]] == [Goal.CROSS_ATTENTION, Goal.SKETCH]
    polish = {effort: own[-1].steps * own[-1].latents for effort, own in stages.items() if effort is not Effort.QUICK}
    assert polish[Effort.BEST] > 5 * polish[Effort.NORMAL] > 0
    counts = [recording(replace(BASE, effort=effort)).count for effort in Effort]
    assert counts == sorted(counts)


@pytest.mark.parametrize("part", [Part.CROSS_ATTENTION, Part.UNET, Part.TRANSFORMER])
def test_a_named_part_is_the_only_one(part) -> None:
    request = replace(BASE, part=part, use=Use.WHOLE)
    assert [s.goal.value for s in plan.stages(request, composed=False, steady=True)] == [part.value]


def test_what_the_user_sets_goes_for_the_main_stage() -> None:
    request = replace(BASE, use=Use.WHOLE, optimizer="AdamW", learning_rate="0.1", schedule="linear")
    first, *rest = plan.stages(request, composed=False, steady=True)
    evaluations = plan.DEFAULTS[Part.CROSS_ATTENTION].steps * plan.LBFGS_EVALUATIONS
    assert first == plan.Stage(Goal.CROSS_ATTENTION, "AdamW", "0.1", "linear", evaluations)
    assert rest == [plan.SKETCH, plan.POLISH[Effort.NORMAL]]


@pytest.mark.parametrize("steps", [3, 6, 38, 1000])
def test_steps_are_those_of_all_stages_together(steps) -> None:
    planned = plan.stages(replace(BASE, use=Use.WHOLE, steps=steps), composed=False, steady=True)
    assert sum(stage.steps for stage in planned) == steps
    assert [stage.steps > 0 for stage in planned] == [True] * 3


def test_a_single_step_is_the_main_stages() -> None:
    (only,) = plan.stages(replace(BASE, use=Use.WHOLE, steps=1), composed=False, steady=True)
    assert (only.goal, only.steps) == (Goal.CROSS_ATTENTION, 1)


def test_another_optimizer_gets_its_own_rate() -> None:
    (first,) = plan.stages(replace(BASE, optimizer="LBFGS"), composed=False, steady=True)
    assert first.learning_rate == ""
    assert not first.share
    assert first.steps == plan.SKETCH_IN_SENTENCES.steps // plan.LBFGS_EVALUATIONS


def test_learning_rates_follow_the_size_of_the_vectors() -> None:
    small, large = ({"clip_l": torch.full((2, 8), size)} for size in (0.01, 1.0))
    polish = plan.POLISH[Effort.NORMAL]
    for stage in (*plan.DEFAULTS.values(), plan.CROSS_ATTENTION_IN_SENTENCES, plan.SKETCH_IN_SENTENCES, polish):
        rates = [float(stage.sized(vectors).learning_rate) for vectors in (small, large)]
        assert rates[1] == pytest.approx(rates[0] if stage.optimizer == "LBFGS" else 100 * rates[0], rel=0.05)
    given = replace(polish, learning_rate="0.003")
    assert given.sized(large) == given


def test_what_is_learnt_from_by_default_costs_one_generation_and_what_is_asked_for_is_taken() -> None:
    short = recording(BASE)
    assert short.count * short.steps * len(short.offsets) == BASE.sampling_steps
    assert recording(replace(BASE, part=Part.UNET)).count > 1
    asked = recording(replace(BASE, trajectories=3))
    assert (asked.count, asked.steps) == (3, BASE.sampling_steps)


def test_checks_are_at_other_timesteps() -> None:
    """In shares of the distance between two timesteps of recordings with as many steps."""
    assert recording(BASE).steps == checks(BASE).steps
    assert not set(recording(BASE).offsets) & set(checks(BASE).offsets)


def test_a_long_prompt_in_few_vectors_is_learnt_longer_without_the_u_net() -> None:
    usual, squeezed = (
        plan.stages(replace(BASE, use=Use.WHOLE), composed=False, steady=True, squeezed=given)
        for given in (False, True)
    )
    assert squeezed[0].steps == plan.SQUEEZED_STEPS > usual[0].steps
    assert squeezed[1:] == usual[1:]
    asked = replace(BASE, use=Use.WHOLE, part=Part.CROSS_ATTENTION)
    (only,) = plan.stages(asked, composed=False, steady=True, squeezed=True)
    assert only == plan.DEFAULTS[Part.CROSS_ATTENTION]
