"""The two pictures an estimate leaves: a side-by-side sheet and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            label="error on noise not learnt from",
        )
    if unweighted:
        axes.axhline(unweighted, linestyle="--", color="tab:red", linewidth=1, label="the prompt without its weights")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("0 = same as the prompt, 1 = empty prompt")
    axes.legend()
    figure.savefig(path, dpi=100)
