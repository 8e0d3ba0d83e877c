from __future__ import annotations

import dataclasses

import pytest

from lib_estimate.errors import RequestError
from lib_estimate.request import EstimateRequest, ModelOptions, Part, Target, Use

GOOD = EstimateRequest(prompt="a (red:1.6) circle", name="x")


@pytest.mark.parametrize("source", [EstimateRequest, ModelOptions])
def test_every_field_is_explained_and_has_a_valid_default(source: type) -> None:
    for item in dataclasses.fields(source):
        assert item.metadata["help"], item.name
        low, high, choices = (item.metadata[k] for k in ("low", "high", "choices"))
        default = getattr(item.default, "value", item.default)
        assert choices is None or default in choices, item.name
        assert low is None or isinstance(default, str) or low <= default <= (high or default), item.name


def test_a_good_request_validates_to_itself() -> None:
    assert GOOD.validate() is GOOD


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": "  "}, "empty"),
        ({"target": Target.NEGATIVE}, "negative prompt is empty"),
        ({"target": Target.NEGATIVE, "negative": "blurry", "take_over_lora": True}, "leave --take-over-lora or"),
        ({"steps": -1}, "steps"),
        ({"steps": 2.5}, "whole number"),
        ({"steps": True}, "whole number"),
        ({"vectors": 0}, "1 or more"),
        ({"vectors": "many"}, "init_text"),
        ({"cfg_scale": float("nan")}, "cfg_scale"),
        ({"ema": 1.0}, "ema"),
        ({"optimizer": "Adamm"}, "choose one of"),
        ({"loss": "L7"}, "choose one of"),
        ({"steps": 100_001}, "between 0 and 100000"),
        ({"part": "magic"}, "choose one of"),
        ({"use": Use.SENTENCE}, "--sentence"),
        ({"sentence": ("no place",)}, "{}"),
        ({"sentence": ("{} and {}",)}, "once"),
    ],
)
def test_a_bad_field_is_named(change: dict, word: str) -> None:
    with pytest.raises(RequestError, match=word):
        dataclasses.replace(GOOD, **change).validate()


def test_no_number_may_be_below_zero_and_the_smallest_that_means_something_is_taken() -> None:
    for item in dataclasses.fields(EstimateRequest):
        if item.metadata["low"] is not None:
            below = -0.5 if isinstance(item.default, float) else -1
            with pytest.raises(RequestError, match=item.name):
                dataclasses.replace(GOOD, **{item.name: below}).validate()
    ones = dict.fromkeys(("vectors", "batch", "queries"), 1)
    zeros = dict.fromkeys(("steps", "warmup", "patience", "seed", "width", "height", "trajectories", "images"), 0)
    off = dict.fromkeys(("tolerance", "clip_gradient", "ema"), 0.0)
    dataclasses.replace(GOOD, **ones, **zeros, **off, sampling_steps=2, cfg_scale=1.0).validate()


def test_a_lora_of_the_whole_prompt_can_be_taken_over() -> None:
    dataclasses.replace(GOOD, take_over_lora=True).validate()
    with pytest.raises(RequestError, match="--stages"):
        dataclasses.replace(GOOD, take_over_lora=True, stages=True).validate()


def test_the_record_is_plain() -> None:
    record = GOOD.record()
    assert record["part"] == Part.AUTO.value
    assert type(record["part"]) is str
    assert set(record) == {item.name for item in dataclasses.fields(EstimateRequest)}
