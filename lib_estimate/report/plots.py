"""The pictures of an estimate: a side-by-side sheet, the learning curve, and the curve while it still grows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

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
MARGIN = 46  # pixels, for the numbers of the axis


def live_curve(
    losses: Sequence[tuple[int, float]], errors: Sequence[tuple[int, float]], unweighted: float | None
) -> Image.Image:
    """The curve as it grows, quickly drawn: losses and errors as (step, value) on a logarithmic axis.

    Where an error is not a number, its line breaks off.

    Grey: the loss of each step. Blue: the error that the best vectors are picked by. Red, dashed: the prompt without
    its weights.
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
        return MARGIN + step / last * (width - MARGIN - GAP), height - MARGIN / 2 - up * (height - MARGIN)

    for power in range(low, high + 1):
        y = at(0, 10.0**power)[1]
        pen.line((MARGIN, y, width - GAP, y), fill=(225, 225, 225))
        pen.text((4, y - 7), f"{10.0**power:g}", fill=(110, 110, 110), font=font)
    pen.line([at(s, v) for s, v in losses if v > 0], fill=(165, 165, 165), width=1)
    for gap, stretch in groupby(errors, lambda point: math.isnan(point[1])):
        points = [] if gap else [at(step, error) for step, error in stretch]
        for x, y in points:
            pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=(30, 100, 200))
        pen.line(points, fill=(30, 100, 200), width=2)
    if unweighted:
        y = at(0, unweighted)[1]
        for x in range(MARGIN, width - GAP, 12):
            pen.line((x, y, x + 6, y), fill=(200, 40, 40), width=2)
    legend = "grey: loss   blue: error to pick by" + ("   red: the prompt without its weights" if unweighted else "")
    # Below, because a tab puts its own label over the upper corner.
    pen.text((MARGIN, height - 18), f"step {last}   {legend}", fill=(90, 90, 90), font=font)
    return out
