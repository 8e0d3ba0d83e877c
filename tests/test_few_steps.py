"""Estimates as LCM, Turbo and Lightning merges are sampled: few steps, and a CFG scale of 1, where the negative prompt
has no effect and isn't run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib_estimate.errors import RequestError
from lib_estimate.job import cost_sentence
from lib_estimate.request import EstimateRequest, Part, Target
from tests.conftest import run


@pytest.fixture
def few(short) -> EstimateRequest:
    return replace(short, negative="a star", sampling_steps=4, cfg_scale=1.0, images=1, steps=1, optimizer="Adam")


def test_half_of_a_generation_is_not_run(host, few) -> None:
    """Counted by the network itself. Measuring needs the empty prompt in any case."""
    calls, samples = [], 0

    def forward(_, args, out) -> None:
        nonlocal samples
        samples += len(args[0])
        if out[0].requires_grad:
            calls.append(len(args[0]))

    handle = host.parts.unet.register_forward_hook(forward)
    try:
        at_one = run(few, host)
    finally:
        handle.remove()
    counted = at_one.record["forwards"]
    assert sum(counted.values()) == samples + 2 * sum(calls)
    usual = run(replace(few, cfg_scale=1.5, overwrite=True), host).record["forwards"]
    one = few.sampling_steps  # forwards of a side of a generation
    assert usual["recording"] - counted["recording"] == (1 + 2) * one  # learnt from, and checked on two seeds
    assert usual["report"] - counted["report"] == 3 * one  # three pictures
    assert usual["learning"] == counted["learning"]
    assert 0 < at_one.fidelity.error < 1
    assert 0 < at_one.fidelity.picture_error < 1


@pytest.mark.parametrize(
    ("prompt", "changes"),
    [
        ("[a (red:1.6) circle:a (blue:1.4) star:0.5]", {"stages": True, "part": Part.CROSS_ATTENTION}),
    ],
)
def test_all_of_it_works_without_the_negative_prompt(host, few, prompt, changes) -> None:
    outcome = run(replace(few, prompt=prompt, **changes), host)
    figures = [outcome.fidelity.error, outcome.fidelity.picture_error]
    assert all(0 <= figure < 1.5 for figure in figures), figures


@pytest.mark.parametrize("target", [Target.NEGATIVE, Target.BOTH])
def test_a_negative_prompt_without_effect_is_refused(few, target) -> None:
    with pytest.raises(RequestError, match="At CFG scale 1 the negative prompt has no effect"):
        replace(few, target=target).validate()
    replace(few, target=target, cfg_scale=1.1).validate()


def test_a_picture_costs_half_there() -> None:
    spent = {"recording": 8, "learning": 8, "report": 8}
    assert cost_sentence(spent, 4, 1.0).startswith("It cost as much as 6 pictures: 4 to learn, 2 to report")
    assert cost_sentence(spent, 4, 1.5).startswith("It cost as much as 3 pictures: 2 to learn, 1 to report")
