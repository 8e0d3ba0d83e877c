"""Procedural pictures of coloured shapes with plain English captions: what the small model is trained on.

A scene is one or two shapes on a background of one colour. Everything is drawn from a `random.Random`, so a seed makes
the data set repeat.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 128  # pixels, both ways
SUPERSAMPLE = 3  # drawn larger and reduced: smooth edges

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (245, 225, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 215),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
BACKGROUNDS = {**COLOURS, "gray": (140, 140, 140)}
SHAPES = ("circle", "square", "triangle", "star", "ring")
PLACES = {  # phrase -> centre of the object in units of the picture, before jitter
    "on the left": (0.3, 0.5),
    "on the right": (0.7, 0.5),
    "at the top": (0.5, 0.3),
    "at the bottom": (0.5, 0.7),
    "in the middle": (0.5, 0.5),
}
RELATIONS = {  # phrase between the objects -> centres of the first and of the second
    "to the left of": ((0.27, 0.5), (0.73, 0.5)),
    "to the right of": ((0.73, 0.5), (0.27, 0.5)),
    "above": ((0.5, 0.27), (0.5, 0.73)),
    "on top of": ((0.5, 0.27), (0.5, 0.73)),
    "below": ((0.5, 0.73), (0.5, 0.27)),
}
OPENINGS = ("", "", "a photo of ", "a drawing of ", "a picture of ")


@dataclass(frozen=True)
class Thing:
    colour: str
    shape: str
    size: str  # "large" or "small"
    x: float  # centre, 0 to 1
    y: float
    radius: float  # 0 to 1


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: str
    place: str | None  # of a single thing, where it stands apart from the middle
    relation: str | None  # of two things


def random_scene(rng: random.Random) -> Scene:
    """One scene; two shapes in 45 of 100."""
    background = rng.choice([*BACKGROUNDS, "white", "gray"])
    if rng.random() < 0.55:
        place = "in the middle" if rng.random() < 0.5 else rng.choice(list(PLACES))
        return Scene((_thing(rng, PLACES[place], background, False),), background, place, None)
    relation = rng.choice(list(RELATIONS))
    first, second = RELATIONS[relation]
    return Scene(
        (_thing(rng, first, background, True), _thing(rng, second, background, True)), background, None, relation
    )


def _thing(rng: random.Random, centre: tuple[float, float], background: str, shares: bool) -> Thing:
    """A shape at about `centre`, in another colour than the background; smaller where it `shares` the picture."""
    size = rng.choice(["large", "small"])
    low, high = {"large": (0.19, 0.22), "small": (0.13, 0.15)}[size]
    if not shares:
        low, high = {"large": (0.26, 0.3), "small": (0.15, 0.18)}[size]
    return Thing(
        colour=rng.choice([c for c in COLOURS if c != background]),
        shape=rng.choice(SHAPES),
        size=size,
        x=centre[0] + rng.uniform(-0.02, 0.02),
        y=centre[1] + rng.uniform(-0.02, 0.02),
        radius=rng.uniform(low, high),
    )


def caption(scene: Scene, rng: random.Random) -> str:
    """A sentence that tells the scene.

    What it leaves out is always the same: a thing is large and in the middle, the background is white, and "and" or
    "next to" means from left to right. So a small model need not choose among places where a large one would.
    """
    words = [_phrase(t, rng) for t in scene.things]
    text = words[0]
    if scene.relation is not None:
        beside = scene.relation == "to the left of" and rng.random() < 0.5
        text = f"{words[0]} {rng.choice(['and', 'next to']) if beside else scene.relation} {words[1]}"
    elif scene.place != "in the middle" or rng.random() < 0.15:
        text += f" {scene.place}"
    if scene.background != "white" or rng.random() < 0.5:
        text += f" on {_article(scene.background, rng)}{scene.background} background"
    return rng.choice(OPENINGS) + text


def _phrase(thing: Thing, rng: random.Random) -> str:
    size = thing.size + " " if thing.size == "small" or rng.random() < 0.3 else ""
    phrase = f"{size}{thing.colour} {thing.shape}"
    return (_article(phrase, rng) if rng.random() < 0.85 else "") + phrase


def _article(phrase: str, rng: random.Random) -> str:
    """ "a " or "an "; people write "a orange star" as well, so both are learnt."""
    return "an " if phrase[0] in "aeiou" and rng.random() < 0.6 else "a "


def draw(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture, uint8 `[SIZE, SIZE, 3]`; each colour shifts a little from picture to picture."""
    side = SIZE * SUPERSAMPLE
    image = Image.new("RGB", (side, side), _shifted(BACKGROUNDS[scene.background], rng))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        fill = _shifted(COLOURS[thing.colour], rng)
        _draw_shape(pen, thing, side, fill, image.getpixel((0, 0)))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def _draw_shape(pen: ImageDraw.ImageDraw, thing: Thing, side: int, fill, behind) -> None:
    x, y, r = thing.x * side, thing.y * side, thing.radius * side
    if thing.shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)
        if thing.shape == "ring":
            hole = 0.55 * r
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=behind)
    else:
        pen.polygon([(x + r * dx, y + r * dy) for dx, dy in corners(thing.shape)], fill=fill)


def corners(shape: str) -> list[tuple[float, float]]:
    """Corner points of a polygon shape of radius about 1, y downwards."""
    if shape == "square":
        return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
    if shape == "triangle":
        return [(0.0, -1.0), (1.0, 0.8), (-1.0, 0.8)]
    turn = [(math.pi * k / 5 - math.pi / 2, 1.15 if k % 2 == 0 else 0.48) for k in range(10)]
    return [(length * math.cos(angle), length * math.sin(angle)) for angle, length in turn]


def _shifted(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, c + rng.randint(-8, 8))) for c in colour)
