"""What is left out where a library is missing, and that nothing is where all are there."""

from __future__ import annotations

from pathlib import Path

from tests.left_out import PROJECT, left_out


def without(*missing: str) -> dict[Path, list[str]]:
    return left_out(lambda library: library not in missing)


def test_nothing_is_left_out_where_everything_is_there() -> None:
    assert without() == {}


def test_a_file_is_left_out_for_what_its_imports_import() -> None:
    tests = PROJECT / "tests"
    gone = without("diffusers")
    assert gone[tests / "hosts" / "test_families.py"] == ["diffusers"]  # by way of tests.small_models
    assert tests / "prompt" / "test_prompt_language.py" not in gone
    assert tests / "prompt" / "test_prompt_language.py" in without("hypothesis")
    assert without("matplotlib") == {}  # imported where a curve is drawn
