"""`python -m tests.bench.long`: how few vectors hold a long prompt, from a ladder of prompts as people write them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Conditioning
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import learn
from lib_estimate.progress import Cancel
from lib_estimate.report.fidelity import picture_error
from lib_estimate.request import EstimateRequest, ModelOptions, Start, Target, Use
from lib_estimate.target.bank import HELD_OUT, PICTURES, build_bank, latent_noise, noise_under
from lib_estimate.target.error import share_of_empty
from lib_estimate.target.recording import materials_of
from lib_estimate.target.target import build_target
from tests.bench.__main__ import SMALL_MODEL
from tests.bench.compare import OFFSET
from tests.bench.measure import drained

COUNTS = (75, 32, 16, 8)
SEEDS, IMAGES = 2, 4
QUALITY = "masterpiece, best quality, (highly detailed:1.3), absurdres, sharp focus, soft light, 8k, ultra realistic"
BAD = (
    "(worst quality:1.4), (low quality:1.4), (normal quality:1.2), lowres, bad anatomy, bad hands, ((monochrome)), "
    "((grayscale)), skin spots, acnes, skin blemishes, age spot, glans, extra fingers, fewer fingers, strange fingers, "
    "bad hand, mole, (ugly eyes:1.2), deformed iris, deformed pupils, fused lips and teeth, text, jpeg artifacts, "
    "signature, watermark, username, blurry, cropped, out of frame, duplicate, morbid, mutilated, poorly drawn face"
)
PROMPTS: tuple[tuple[str, str], ...] = (  # name, text; a name that begins with "negative" is one
    (
        "quality words and a scene",
        f"{QUALITY}, a photo of a (large:1.2) red circle on a (blue background:1.3), cinematic lighting, film grain, "
        "85mm, depth of field, volumetric fog, intricate, elegant, trending on artstation, award winning photograph, "
        "vivid colors, high contrast, studio lighting, ray tracing, hyper detailed, professional color grading",
    ),
    (
        "tags",
        "score_9, score_8_up, score_7_up, source_anime, 1girl, solo, (long hair:1.2), (green:1.3) eyes, red star, "
        "hair ornament, white shirt, pleated skirt, black thighhighs, looking at viewer, smile, blush, standing, "
        "outdoors, (yellow background:1.4), cherry blossoms, wind, petals, sunlight, lens flare, bokeh, dutch angle, "
        "cowboy shot, detailed background, official art, (aesthetic:1.1), very aesthetic, newest, rating_safe, "
        "cloud, blue sky, day, mountain, river, grass, flower, bird, tree, bridge, lantern, ribbon",
    ),
    ("negative list", f"{BAD}, (red:1.3), star"),
    ("negative list twice as long", f"{BAD}, (blue background:1.2), {BAD.replace('1.4', '1.2')}, (purple ring:1.3)"),
    (
        "two regions",
        "(masterpiece:1.2), best quality, a photo of two shapes on a white background, soft shadow, studio BREAK "
        "a (red:1.5) circle on the left, glossy, smooth, reflections, highly detailed, sharp BREAK a (blue:1.4) square "
        "on the right, matte, rough, dark, wooden texture, highly detailed, sharp",
    ),
    (
        "three regions",
        f"{QUALITY}, wide shot of a garden at night, (fireflies:1.2) BREAK a large (yellow:1.5) star at the top, "
        "glowing, warm, halo, bloom BREAK a small green triangle at the bottom, (wet grass:1.3), dew, reflections "
        "BREAK (black background:1.2), mist, moonlight, silhouettes of trees, faint stars",
    ),
    (
        "a sentence of prose",
        "an oil painting of a large orange circle above a purple square, painted in the style of the old masters with "
        "thick brush strokes and a heavy golden frame, hanging on a (gray background:1.3) in an old museum, lit by a "
        "single lamp from the left, while an old man with a black hat looks at it, (dramatic shadows:1.4), dust in the "
        "air, warm colours, high detail, photographed from below with a wide angle lens on a rainy evening in october",
    ),
    (
        "weights everywhere",
        "(red:1.4) (circle:1.2), (glossy:0.8), (on a white background:1.3), (smooth:1.1), [soft light], ((sharp)), "
        "(detailed:1.2), [[grainy]], (reflection:0.7), (large:1.5), (photo:1.3), (macro:1.1), (simple:1.4), [noise], "
        "(clean:1.2), (minimal:1.3), (centered:1.2), (vector art:0.6), ((flat colors)), (product shot:1.1), (4k:1.2)",
    ),
    (
        "quality words, a scene, and a list of faults",
        f"{QUALITY}, a (green:1.4) square to the left of a red ring, (white background:1.2), {BAD}, {QUALITY}, "
        f"a painting, (thick lines:1.3), vivid, {QUALITY}, large shapes",
    ),
    (
        "a poster",
        "a drawing of a small blue triangle below a yellow ring, (crayon:1.3), paper texture, (black background:1.5), "
        "rough sketch, thick lines, hand drawn, childish, playful, bright colors, simple shapes, flat, no shadow, "
        "scanned, high resolution, white border, crumpled paper, pencil marks, faded, vintage, poster",
    ),
)

Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.long", description=__doc__)
    parser.add_argument("--model", type=Path, default=SMALL_MODEL)
    parser.add_argument("--prompts", type=int, nargs="*", default=range(len(PROMPTS)), metavar="N", help="by number")
    parser.add_argument("--counts", type=int, nargs="*", default=COUNTS, metavar="N", help="of vectors (75 32 16 8)")
    parser.add_argument("--effort", default="normal")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    with StandaloneHost(ModelOptions(model=str(args.model), device="cpu")).session() as session:
        for number in args.prompts:
            for row in ladder(session, *PROMPTS[number], args.counts, args.effort):
                rows.append(row)
                print(" ".join(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    for count in args.counts:
        own = [row for row in rows if row["vectors"] == count]
        for figure in ("error", "latents"):
            values = [row[figure] for row in own]
            print(f"{count} vectors, {figure}: median {median(values):.4f}, worst {max(values):.4f}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0


def ladder(session: StandaloneSession, name: str, text: str, counts: Sequence[int], effort: str) -> Iterator[Row]:
    """A row for each number of vectors, all learnt from the same recording."""
    negative = name.startswith("negative")
    given = {"prompt": "a photo of a large circle", "negative": text, "target": Target.NEGATIVE}
    request = EstimateRequest(
        name="long", use=Use.WHOLE, start=Start.POOLED, images=IMAGES, effort=type(EstimateRequest.effort)(effort),
        **(given if negative else {"prompt": text}),
    ).validate()  # fmt: skip
    judge = Judge(session, request)
    began = session.forwards
    materials = drained(materials_of(request, session, judge.target, Cancel()))
    recording = session.forwards - began
    tokens = len(next(iter(session.token_vectors(text).values())))
    yield judge.row(name, tokens, 0, judge.unweighted(), 0)
    for count in counts:
        own, began = replace(request, vectors=count), session.forwards
        run = drained(learn(own, session, materials, initial_vectors(own, session), Cancel()))
        spent = recording + session.forwards - began
        yield judge.row(name, tokens, count, judge.of(run.best), spent)


class Judge:
    """What every number of vectors is measured by: noise and pictures that are never learnt from."""

    def __init__(self, session: StandaloneSession, request: EstimateRequest) -> None:
        self.session, self.request = session, request
        self.target = build_target(request, session)
        noise = latent_noise(request, session, HELD_OUT, SEEDS)
        *_, self.bank = build_bank(session, self.target, noise, request.cfg_scale, offset=OFFSET)
        self.wanted = self._final(self.target.guidance)
        self.empty = self._final(self.target.with_embedding(self.target.empty))

    @torch.no_grad()
    def of(self, vectors: Vectors) -> tuple[float, float]:
        """The weighted error and what is left of the finished latents, as shares of the empty prompt's."""
        embedded: Conditioning = self.target.embed(self.session, vectors)
        eps = noise_under(self.session, self.bank.x, self.bank.timestep, embedded)
        final = self._final(self.target.with_embedding(embedded))
        return share_of_empty(eps, self.bank, weighted=True), picture_error(final, self.wanted, self.empty)

    def unweighted(self) -> tuple[float, float]:
        error = share_of_empty(self.bank.plain, self.bank, weighted=True)
        return error, picture_error(self._final(self.target.plain), self.wanted, self.empty)

    def row(self, name: str, tokens: int, vectors: int, figures: tuple[float, float], forwards: int) -> Row:
        return {
            "prompt": name, "tokens": tokens, "vectors": vectors, "error": figures[0], "latents": figures[1],
            "forwards": forwards,
        }  # fmt: skip

    def _final(self, guidance):
        noise = latent_noise(self.request, self.session, PICTURES, IMAGES)
        *_, path = self.session.sample(noise, guidance, self.request.cfg_scale)
        return path.final


if __name__ == "__main__":
    sys.exit(main())
