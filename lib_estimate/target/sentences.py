"""The sentences an embedding is fitted in and judged in.

A sentence is a text with one `{}` where the embedding stands. Random ones are drawn from three pools: sentences like
captions, loose words, and random token ids. Caption-like ones teach what people write; words and tokens keep the fit
from leaning on any one grammar. What is judged with is drawn apart and never learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from lib_estimate.request import HOLE

OPENINGS = (
    "a photo of {}", "a picture of {}", "a painting of {}", "a drawing of {}", "an image of {}", "a close-up of {}",
    "a sketch of {}", "portrait of {}", "{}", "{}", "a large {}", "a small {}",
)  # fmt: skip
PLACES = (
    "on the left", "on the right", "at the top", "at the bottom", "in the middle", "on a table", "in a garden",
    "in the snow", "by the sea", "at night", "in the city", "under a tree",
)  # fmt: skip
BACKGROUNDS = (
    "on a white background", "on a black background", "on a blue background", "on a red background",
    "on a green background", "on a yellow background", "with a gray background", "in front of a wall",
)  # fmt: skip
COMPANIONS = (
    "a blue star", "a red ball", "a small dog", "a white house", "a yellow square", "a tall woman", "a black ring",
    "an old car", "a purple flower", "a green triangle",
)  # fmt: skip
JOINTS = ("and", "next to", "to the left of", "to the right of", "above", "below", "on top of", "with")
ENDINGS = ("highly detailed", "soft light", "sharp focus", "by night", "masterpiece", "oil on canvas", "wide angle")
WORDS = (
    "a", "the", "of", "and", "with", "in", "on", "large", "small", "red", "orange", "yellow", "green", "blue", "purple",
    "white", "black", "gray", "left", "right", "top", "bottom", "background", "photo", "picture", "drawing", "circle",
    "square", "triangle", "star", "ring", "man", "woman", "girl", "dog", "cat", "house", "tree", "sky", "light", "dark",
    "old", "new", "beautiful", "detailed", "face", "hair", "eyes", "city", "water", "night", "day", "style", "art",
)  # fmt: skip
LONGEST = 8  # words or tokens on either side


def random_sentence(rng: Random, random_tokens: Callable[[Random, int], str]) -> str:
    """One sentence from a pool chosen at random; `random_tokens(rng, count)` gives text of random token ids."""
    pool = rng.randrange(3)
    if pool == 0:
        return caption_like(rng)
    sides = [rng.randrange(LONGEST + 1) for _ in range(2)]
    if pool == 1:
        before, after = (" ".join(rng.choices(WORDS, k=count)) for count in sides)
    else:
        before, after = (random_tokens(rng, count) for count in sides)
    return f"{before} {HOLE} {after}".strip()


def caption_like(rng: Random) -> str:
    """A sentence as people write captions: opening, perhaps another thing, place, background, quality words."""
    text = rng.choice(OPENINGS)
    if rng.random() < 0.35:
        other = rng.choice(COMPANIONS)
        text = f"{text} {rng.choice(JOINTS)} {other}" if rng.random() < 0.5 else f"{other} {rng.choice(JOINTS)} {text}"
    if rng.random() < 0.35:
        text += " " + rng.choice(PLACES)
    if rng.random() < 0.35:
        text += " " + rng.choice(BACKGROUNDS)
    if rng.random() < 0.2:
        text += ", " + rng.choice(ENDINGS)
    return text


def distinct(rng: Random, count: int, avoid: Sequence[str], random_tokens: Callable[[Random, int], str]) -> list[str]:
    """`count` different random sentences, none of them in `avoid`, none of them the embedding alone."""
    found: dict[str, None] = {}
    while len(found) < count:
        sentence = random_sentence(rng, random_tokens)
        if sentence != HOLE and sentence not in avoid:
            found[sentence] = None
    return list(found)
