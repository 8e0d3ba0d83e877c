"""Counts how often the small model draws what its prompt says: a sheet of pictures, judged by colour and outline.

    python -m tests.shapes_sd.check            # writes COUNT.json and prints the figures; about two minutes
    python -m tests.shapes_sd.check --sheet sheet.png

The judge sees pixels only: every pixel gets the nearest palette colour, connected patches of a colour are things, and a
patch's shape is the one whose outline it overlaps best.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from lib_estimate.hosts.base import StepConditioning, Trajectory
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import ModelOptions
from tests.shapes_sd import pictures

HERE = Path(__file__).parent
STEPS, CFG_SCALE, SEED = 20, 5.0, 7
PALETTE = {name: np.array(colour) for name, colour in pictures.BACKGROUNDS.items()}
SMALLEST_PATCH = 60  # pixels
GRID = 40  # outlines are compared at this size


def single_prompts(count: int, rng: random.Random) -> list[tuple[str, list[tuple[str, str]], str]]:
    """(prompt, [(colour, shape)], background) of one shape on a background."""
    rows = []
    for _ in range(count):
        background = rng.choice(list(pictures.BACKGROUNDS))
        colour = rng.choice([c for c in pictures.COLOURS if c != background])
        shape = rng.choice(pictures.SHAPES)
        rows.append((f"a {colour} {shape} on a {background} background", [(colour, shape)], background))
    return rows


def pair_prompts(count: int, rng: random.Random) -> list[tuple[str, list[tuple[str, str]], str]]:
    """The same with two shapes of different colours."""
    rows = []
    for _ in range(count):
        background = rng.choice(list(pictures.BACKGROUNDS))
        colours = rng.sample([c for c in pictures.COLOURS if c != background], 2)
        things = [(colour, rng.choice(pictures.SHAPES)) for colour in colours]
        names = [f"a {colour} {shape}" for colour, shape in things]
        relation = rng.choice(list(pictures.RELATIONS))
        rows.append((f"{names[0]} {relation} {names[1]} on a {background} background", things, background))
    return rows


def drawn(host: StandaloneHost, prompts: list[str]) -> list[np.ndarray]:
    """One picture per prompt, uint8 `[H, W, 3]`."""
    with host.session() as session:
        info = session.info
        side = info.default_size // info.latent_scale
        noise = torch.randn(
            len(prompts), info.latent_channels, side, side, generator=torch.Generator().manual_seed(SEED)
        )
        with torch.no_grad():
            step = StepConditioning(((1.0, session.encode(prompts)),), session.encode([""]))
            *_, path = session.sample(noise, [step] * STEPS, CFG_SCALE)
        assert isinstance(path, Trajectory)
        batch = session.decode(path.final)
    return list((batch.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8))


# ---- the judge ----------------------------------------------------------------------------------------------------


def colours_of(picture: np.ndarray) -> np.ndarray:
    """Index of the nearest palette colour of each pixel, `[H, W]`."""
    distance = [np.abs(picture.astype(int) - colour).sum(-1) for colour in PALETTE.values()]
    return np.argmin(distance, 0)


def background_of(picture: np.ndarray) -> str:
    """The commonest colour along the edges."""
    nearest = colours_of(picture)
    edge = np.concatenate([nearest[:4].ravel(), nearest[-4:].ravel(), nearest[:, :4].ravel(), nearest[:, -4:].ravel()])
    return list(PALETTE)[np.bincount(edge, minlength=len(PALETTE)).argmax()]


def things_of(picture: np.ndarray, background: str) -> list[tuple[str, str]]:
    """(colour, shape) of each patch that is not background."""
    nearest, names = colours_of(picture), list(PALETTE)
    found = []
    for mask in patches(nearest != names.index(background)):
        inside = np.bincount(nearest[mask], minlength=len(names))
        found.append((names[inside.argmax()], shape_of(mask)))
    return found


def patches(mask: np.ndarray) -> list[np.ndarray]:
    """Connected patches of a mask, without specks; by repeated flood fill on the pixel grid."""
    left, found = mask.copy(), []
    while left.any():
        seed = np.zeros_like(left)
        seed[tuple(np.argwhere(left)[0])] = True
        while True:
            grown = seed.copy()
            grown[1:] |= seed[:-1]
            grown[:-1] |= seed[1:]
            grown[:, 1:] |= seed[:, :-1]
            grown[:, :-1] |= seed[:, 1:]
            grown &= left
            if (grown == seed).all():
                break
            seed = grown
        left &= ~seed
        if seed.sum() >= SMALLEST_PATCH:
            found.append(seed)
    return found


def shape_of(mask: np.ndarray) -> str:
    """The shape whose outline, fitted into the patch's box, overlaps it best."""
    ys, xs = np.nonzero(mask)
    box = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    patch = np.asarray(Image.fromarray(box).resize((GRID, GRID))) > 0
    overlap = {name: (patch & shape).sum() / (patch | shape).sum() for name, shape in outlines().items()}
    return max(overlap, key=overlap.get)


def outlines() -> dict[str, np.ndarray]:
    out = {}
    for name in pictures.SHAPES:
        scene = pictures.Scene((pictures.Thing("black", name, "large", 0.5, 0.5, 0.3),), "white", None, None)
        dark = pictures.draw(scene, random.Random(0)).sum(-1) < 380
        ys, xs = np.nonzero(dark)
        box = Image.fromarray(dark[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])
        out[name] = np.asarray(box.resize((GRID, GRID))) > 0
    return out


def right(picture: np.ndarray, things: list[tuple[str, str]], background: str) -> dict[str, bool]:
    """What of a prompt the picture shows. A pair counts when both its things are there, each in its own colour."""
    seen = things_of(picture, background_of(picture))
    return {
        "background": background_of(picture) == background,
        "colour": sorted(c for c, _ in things) == sorted(c for c, _ in seen),
        "shape": sorted(s for _, s in things) == sorted(s for _, s in seen),
        "things": sorted(things) == sorted(seen),
    }


def count(host: StandaloneHost, rows: list, save: list | None = None) -> dict[str, int]:
    judged = []
    for picture, (prompt, things, background) in zip(drawn(host, [r[0] for r in rows]), rows, strict=True):
        verdict = right(picture, things, background)
        verdict["all"] = verdict["background"] and verdict["things"]
        judged.append(verdict)
        if save is not None:
            save.append((picture, prompt, verdict["all"]))
    return {"pictures": len(rows)} | {name: sum(v[name] for v in judged) for name in judged[0]}


def save_sheet(rows: list, path: Path, columns: int = 10) -> None:
    """All pictures; a red frame around those judged wrong."""
    side = pictures.SIZE + 8
    sheet = Image.new("RGB", (side * columns, side * -(-len(rows) // columns)), "white")
    for index, (picture, _, good) in enumerate(rows):
        left, top = side * (index % columns), side * (index // columns)
        if not good:
            ImageDraw.Draw(sheet).rectangle((left, top, left + side - 2, top + side - 2), outline="red", width=3)
        sheet.paste(Image.fromarray(picture), (left + 4, top + 4))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "shapes_sd.safetensors"))
    parser.add_argument("--sheet", type=Path)
    args = parser.parse_args()
    host = StandaloneHost(ModelOptions(model=args.model))
    rng, rows = random.Random(SEED), []
    result = {"single": count(host, single_prompts(60, rng), rows), "pair": count(host, pair_prompts(60, rng), rows)}
    print(json.dumps(result, indent=1))
    if args.model == str(HERE / "shapes_sd.safetensors"):
        (HERE / "COUNT.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.sheet:
        save_sheet(rows, args.sheet)


if __name__ == "__main__":
    main()
