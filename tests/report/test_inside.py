"""What is inside of an embedding, beside tables that are known."""

from __future__ import annotations

import pytest
import torch

from lib_estimate.hosts.base import Words
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.report.inside import lengths, look_inside, nearest_words
from lib_estimate.request import ModelOptions
from tests.small_models import FIRST, SECOND, small_model

KEY = "clip_l"


def table(count: int = 2000, width: int = 16) -> torch.Tensor:
    """Rows of lengths from 0.9 to 1.1."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True) * torch.linspace(0.9, 1.1, count)[:, None]


def test_a_word_is_its_own_nearest_word(session) -> None:
    look = look_inside(session.token_vectors("a red circle"), session.words())[KEY]
    assert [vector.words[0][0] for vector in look.vectors] == ["a", "red", "circle"]
    assert all(vector.words[0][1] == pytest.approx(1, abs=1e-5) for vector in look.vectors)
    assert look.typical == pytest.approx(session.table_norm()[KEY])
    assert not look.warnings()


def test_a_mixture_is_near_to_what_it_is_made_of(session) -> None:
    red, star = session.token_vectors("red star")[KEY]
    (vector,) = look_inside({KEY: (red + star)[None]}, session.words(), count=2)[KEY].vectors
    assert {word for word, _ in vector.words} == {"red", "star"}


def test_the_nearest_come_first_and_each_word_once() -> None:
    known = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    words = Words({KEY: known}, ["x", "x", "both", ""].__getitem__)
    found = nearest_words(torch.tensor([[3.0, 0.1], [0.0, 0.0]]), known, words, 3)
    assert [word for word, _ in found[0]] == ["x", "both", "token 3"]
    assert [cosine for _, cosine in found[0]] == sorted((cosine for _, cosine in found[0]), reverse=True)
    assert found[1] == (), "a vector of zeros points nowhere"


@pytest.mark.parametrize(("length", "far"), [(0.0, True), (0.44, True), (0.46, False), (2.19, False), (2.21, True)])
def test_far_is_told_by_the_tables_own_lengths(length, far) -> None:
    """Twice as long as 999 of 1000 words, or half as long."""
    words = Words({KEY: table()}, str)
    look = look_inside({KEY: length * table()[7:8] / table()[7:8].norm()}, words)[KEY]
    assert look.usual == pytest.approx((0.9, 1.1), abs=1e-3)
    assert look.vectors[0].far is far
    assert bool(look.warnings()) is far
    assert not far or f"vector 1; {length:.2g} times as long" in look.warnings()[0]


def test_a_warning_names_the_vectors_and_how_far_they_are() -> None:
    rows = table()[1000:1003] * torch.tensor([[1.0], [5.0], [20.0]])
    look = look_inside({KEY: rows}, Words({KEY: table()}, str))[KEY]
    assert "vectors 2, 3; 5 to 20 times as long" in look.warnings()[0]
    look = look_inside({KEY: 5 * table()[1000:1003]}, Words({KEY: table()}, str))[KEY]
    assert "all 3 vectors; 5 times as long" in look.warnings()[0]


def test_without_a_model_there_are_lengths_only() -> None:
    look = lengths({KEY: torch.tensor([[3.0, 4.0]])})[KEY]
    assert (look.width, look.vectors[0].length, look.typical) == (2, 5.0, None)
    assert look.vectors[0].words == ()
    assert not look.warnings()
    assert look.record()["length"] == 5.0


def test_both_text_encoders_of_sdxl_are_asked(tmp_path) -> None:
    small_model("sdxl").pipeline().save_pretrained(tmp_path / "xl")
    host = StandaloneHost(ModelOptions(model=str(tmp_path / "xl"), device="cpu", dtype="float16"))
    with host.session() as session:
        looks = look_inside(session.token_vectors("red star"), session.words())
    assert {key: look.width for key, look in looks.items()} == {"clip_l": FIRST, "clip_g": SECOND}
    for look in looks.values():
        assert [vector.words[0][0] for vector in look.vectors] == ["red", "star"]
