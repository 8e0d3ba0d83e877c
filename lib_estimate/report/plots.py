"""The pictures of an estimate: a side-by-side sheet, the learning curve, and the curve while it still grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 8  # pixels between pictures
HEADER = 26
SMALLEST = 160  # smaller pictures are enlarged to this, so that a sheet can be looked at


def sheet(pictures: Mapping[str, Tensor], titles: Mapping[str, str]) -> Image.Image:
    """One column per kind of picture, one row per seed. pictures: name -> `[B, 3, H, W]` in 0..1."""
    columns = {name: [_image(picture) for picture in batch] for name, batch in pictures.items()}
    width, height = next(iter(columns.values()))[0].size
    rows = max(len(images) for images in columns.values())
    out = Image.new("RGB", ((width + GAP) * len(columns) + GAP, (height + GAP) * rows + HEADER + GAP), "white")
    pen, font = ImageDraw.Draw(out), _font()
    for column, (name, images) in enumerate(columns.items()):
        left = GAP + column * (width + GAP)
        pen.text((left, GAP), _cut(titles.get(name, name), pen, font, width), fill="black", font=font)
        for row, image in enumerate(images):
            out.paste(image, (left, HEADER + GAP + row * (height + GAP)))
    return out


def below_each_other(sheets: Sequence[Image.Image]) -> Image.Image:
    """Several sheets as one."""
    out = Image.new("RGB", (max(each.width for each in sheets), sum(each.height for each in sheets)), "white")
    top = 0
    for each in sheets:
        out.paste(each, (0, top))
        top += each.height
    return out


def _image(picture: Tensor) -> Image.Image:
    """`[3, H, W]` in 0..1 -> an image, enlarged by a whole factor where it is small."""
    array = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    factor = max(1, -(-SMALLEST // array.shape[1]))
    return Image.fromarray(array).resize((array.shape[1] * factor, array.shape[0] * factor), Image.Resampling.NEAREST)


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(14)
    except TypeError:  # Pillow before 10.1 has one size only
        return ImageFont.load_default()


def _cut(text: str, pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont, width: int) -> str:
    """The text, cut off with dots where it is wider than `width` pixels."""
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text + "..."


def curve(path: Path, losses: Sequence[float], errors: Sequence[tuple[int, float]], unweighted: float | None) -> None:
    """Saves the learning curve: loss per step, measured errors as (step, error), and the error without weights."""
    from matplotlib.figure import Figure  # here, so that a webui without it can import this module

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, color="0.6", label="loss of each step")
    if errors:
        axes.plot(
            *zip(*errors, strict=True),
            marker="o",
            markersize=3,
            color="tab:blue",
            label="error that the best vectors are picked by",
        )
    if unweighted:
        axes.axhline(unweighted, linestyle="--", color="tab:red", linewidth=1, label="the prompt without its weights")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("0 = same as the prompt, 1 = empty prompt")
    axes.legend()
    figure.savefig(path, dpi=100)


CURVE_SIZE = (640, 320)
LEFT, TOP, BOTTOM = 52, 28, 56  # pixels, for the numbers and words of the axes and the legend
GREY, BLUE, RED, INK = (165, 165, 165), (30, 100, 200), (200, 40, 40), (80, 80, 80)


def live_curve(
    losses: Sequence[tuple[int, float]],
    errors: Sequence[tuple[int, float]],
    unweighted: float | None,
    left_out: str = "the weights",
) -> Image.Image:
    """The curve as it grows, quickly drawn: losses and errors as (step, value) on a logarithmic axis.

    Where an error is not a number, its line breaks off.

    Grey: the loss of each step. Blue: the error that the best vectors are picked by, of what isn't learnt from. Red,
    dashed: the prompt without `left_out`.
    """
    width, height = CURVE_SIZE
    out = Image.new("RGB", CURVE_SIZE, "white")
    pen, font = ImageDraw.Draw(out), _font()
    values = [v for _, v in (*losses, *errors) if v > 0 and math.isfinite(v)] + ([unweighted] if unweighted else [])
    if not values:
        return out
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)) + 1e-9)
    last = max(step for step, _ in (*losses, *errors))

    def at(step: float, value: float) -> tuple[float, float]:
        up = (math.log10(max(value, 10**low)) - low) / max(high - low, 1)
        return LEFT + step / last * (width - LEFT - 2 * GAP), height - BOTTOM - up * (height - TOP - BOTTOM)

    for power in range(low, high + 1):
        y = at(0, 10.0**power)[1]
        pen.line((LEFT, y, width - GAP, y), fill=(225, 225, 225))
        pen.text((4, y - 7), f"{10.0**power:g}", fill=INK, font=font)
    pen.line([at(s, v) for s, v in losses if v > 0], fill=GREY, width=1)
    for gap, stretch in groupby(errors, lambda point: math.isnan(point[1])):
        points = [] if gap else [at(step, error) for step, error in stretch]
        for x, y in points:
            pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=BLUE)
        pen.line(points, fill=BLUE, width=2)
    if unweighted:
        y = at(0, unweighted)[1]
        for x in range(LEFT, width - GAP, 12):
            pen.line((x, y, x + 6, y), fill=RED, width=2)
    _labelled(pen, font, last, f"without {left_out}" if unweighted else "")
    return out


def _labelled(pen: ImageDraw.ImageDraw, font: Any, last: int, reference: str) -> None:
    """The words of the axes and the legend; none in the upper corners, over which a tab puts its label and buttons."""
    (width, height), up = CURVE_SIZE, CURVE_SIZE[1] - BOTTOM
    above = "distance to the prompt (lower is closer)"
    pen.text(((width - pen.textlength(above, font=font)) / 2, 4), above, fill=INK, font=font)
    pen.text((LEFT, up + 6), "learning step", fill=INK, font=font)
    pen.text((width - GAP - pen.textlength(str(last), font=font), up + 6), str(last), fill=INK, font=font)
    left = LEFT
    for colour, words in ((GREY, "loss of each step"), (BLUE, "error on what is not learnt from"), (RED, reference)):
        if words:
            pen.line((left, height - 14, left + 18, height - 14), fill=colour, width=3)
            pen.text((left + 24, height - 22), words, fill=INK, font=font)
            left += 24 + pen.textlength(words, font=font) + 20
