"""The docs keep step with the code and with each other."""

from __future__ import annotations

import dataclasses
import re

import pytest

from lib_estimate.interfaces import cli
from lib_estimate.request import EstimateRequest, ModelOptions
from tests import readme

TEXTS = {name: (readme.ROOT / name).read_text(encoding="utf-8") for name in readme.HEADINGS}


@pytest.mark.parametrize("name", readme.HEADINGS)
def test_the_parameter_table_is_the_requests(name) -> None:
    assert readme.START in TEXTS[name]
    assert readme.with_table(TEXTS[name], name) == TEXTS[name], "run python -m tests.readme"


def test_every_field_has_a_japanese_help() -> None:
    fields = {item.name for source in (ModelOptions, EstimateRequest) for item in dataclasses.fields(source)}
    assert fields == set(readme.JAPANESE)


def test_both_have_the_same_headings_in_order() -> None:
    levels = {name: [len(m) for m in re.findall(r"^(#{1,4}) ", text, re.MULTILINE)] for name, text in TEXTS.items()}
    assert levels["README.md"] == levels["README_ja.md"]


@pytest.mark.parametrize("name", readme.HEADINGS)
def test_pictures_and_files_named_are_there(name) -> None:
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", TEXTS[name]):
        assert (readme.ROOT / target).exists(), target


@pytest.mark.parametrize("name", readme.HEADINGS)
def test_commands_shown_are_understood(name) -> None:
    """Each `embedding-estimate ...` line of a code block parses."""
    lines = [line for line in TEXTS[name].splitlines() if re.match(r"(pip .*&& )?embedding-estimate ", line)]
    assert len(lines) >= 4
    import shlex

    for line in lines:
        cli._parser().parse_args(shlex.split(line.split("embedding-estimate ", 1)[1]))
