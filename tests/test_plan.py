from __future__ import annotations

from dataclasses import replace

import pytest

from lib_estimate import plan
from lib_estimate.request import EstimateRequest, Part, Use

BASE = EstimateRequest(prompt="a (red:1.6) circle", name="x")


def parts(request: EstimateRequest, composed: bool = False, steady: bool = True) -> list[str]:
    return [f"{s.part.value} {s.optimizer}" for s in plan.stages(request, composed=composed, steady=steady)]


def test_auto_learns_over_sentences_unless_told_where_the_word_stands() -> None:
    assert parts(BASE) == ["cross-attention Adam"]
    whole = ["cross-attention LBFGS", "unet Adam"]
    assert parts(replace(BASE, use=Use.WHOLE)) == whole
    assert parts(replace(BASE, use=Use.SENTENCE, sentence=("a {}",))) == whole


def test_auto_takes_what_can_follow_the_prompt() -> None:
    assert parts(BASE, composed=True, steady=False) == ["unet Adam"]
    assert parts(BASE, steady=False) == ["cross-attention LBFGS", "unet Adam"]


@pytest.mark.parametrize("part", [Part.CROSS_ATTENTION, Part.UNET, Part.TRANSFORMER])
def test_a_named_part_is_the_only_one(part) -> None:
    request = replace(BASE, part=part, use=Use.WHOLE)
    assert [s.part for s in plan.stages(request, composed=False, steady=True)] == [part]


def test_what_the_user_sets_goes_for_the_main_stage() -> None:
    request = replace(BASE, use=Use.WHOLE, optimizer="AdamW", learning_rate="0.1", schedule="linear", steps=7)
    first, polish = plan.stages(request, composed=False, steady=True)
    assert first == plan.Stage(Part.CROSS_ATTENTION, "AdamW", "0.1", "linear", 7)
    assert polish == plan.POLISH


def test_another_optimizer_gets_its_own_rate() -> None:
    (first,) = plan.stages(replace(BASE, optimizer="LBFGS"), composed=False, steady=True)
    assert first.learning_rate == ""


def test_one_trajectory_is_enough_for_cross_attention() -> None:
    assert plan.trajectories(BASE) == 1
    assert plan.trajectories(replace(BASE, part=Part.UNET)) == 4
    assert plan.trajectories(replace(BASE, trajectories=2)) == 2
