from __future__ import annotations

from random import Random

from lib_estimate.target import sentences


def tokens(rng: Random, count: int) -> str:
    return " ".join(f"t{rng.randrange(1000)}" for _ in range(count))


def test_every_sentence_has_one_place_for_the_word() -> None:
    rng = Random(0)
    for _ in range(500):
        sentence = sentences.random_sentence(rng, tokens)
        assert sentence.count(sentences.HOLE) == 1
        assert sentence == sentence.strip()


def test_text_stands_before_after_and_around() -> None:
    found = sentences.distinct(Random(0), 60, (), tokens)
    before = [not s.startswith(sentences.HOLE) for s in found]
    after = [not s.endswith(sentences.HOLE) for s in found]
    assert any(b and not a for b, a in zip(before, after, strict=True))
    assert any(a and not b for b, a in zip(before, after, strict=True))
    assert any(a and b for b, a in zip(before, after, strict=True))


def test_distinct_avoids_what_it_is_told_to() -> None:
    first = sentences.distinct(Random(3), 20, (), tokens)
    assert len(set(first)) == 20
    assert sentences.HOLE not in first
    assert set(sentences.distinct(Random(3), 20, first, tokens)).isdisjoint(first)
    assert sentences.distinct(Random(3), 20, (), tokens) == first


def test_pools_are_all_used() -> None:
    found = sentences.distinct(Random(1), 90, (), tokens)
    assert any(" t" in s or s.startswith("t") for s in found)
    assert any(s.startswith(("a photo of", "a picture of", "a painting of", "a drawing of")) for s in found)
