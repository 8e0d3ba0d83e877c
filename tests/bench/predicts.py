"""Which number predicts the finished picture: `python -m tests.bench.predicts`.

An error of the predicted noise can be summed up over the steps of a generation in two ways (lib_estimate/target/
error.py): every step alike (pooled), or each times dsigma^2, by what it moves the picture (weighted). Two questions
are asked of each, and the finished latents, from the same noise as the prompt's own, are the answer:
- between prompts: which of two prompts, put into another's place, changes its picture more?
- among fits of one prompt: which vectors come closer to its picture?
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import correlation, fmean
from typing import Any, TypeVar

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from lib_estimate.errors import EstimateError
from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import StepConditioning, compose
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.learn.count import starting_vectors
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import learn
from lib_estimate.progress import Cancel
from lib_estimate.report.fidelity import picture_error
from lib_estimate.request import Effort, EstimateRequest, ModelOptions, Part, Use
from lib_estimate.target.bank import HELD_OUT, PICTURES, Bank, build_bank, guided_noise, latent_noise, noise_under
from lib_estimate.target.error import share_of_empty, squared
from lib_estimate.target.recording import materials_of
from lib_estimate.target.target import Target, build_target
from tests.bench.measure import drained

T = TypeVar("T")

SMALL_MODEL = Path(__file__).parents[1] / "shapes_sd" / "shapes_sd.safetensors"
BANK_SEEDS = 3

# What stands in a prompt's place, from what changes its picture little to what changes all of it. The first ones are of
# every kind, for a short run.
PAIRS = (
    ("a (red:1.6) circle", "a red circle"),
    ("a (red:1.6) circle", "a blue circle"),
    ("a (red:1.6) circle", "a (red:1.6) square"),
    ("a (blue:1.5) star on the left", "a (blue:1.5) star on the right"),
    ("a red circle and a (blue:1.5) square", "a blue square and a red circle"),
    # the same without its weights, or with others
    ("a (red:1.6) circle", "a (red:1.3) circle"),
    ("a (green:1.5) square", "a green square"),
    ("(yellow:1.4) star", "yellow star"),
    ("a (purple:1.5) ring", "a purple ring"),
    ("a large (blue:0.6) square on a (green:1.5) background", "a large blue square on a green background"),
    ("(orange:1.3) triangle (on the left:1.4)", "orange triangle on the left"),
    ("a (blue:1.5) star on the left", "a blue star on the left"),
    ("a red circle and a (blue:1.5) square", "a red circle and a blue square"),
    ("a drawing of a ((white)) star on a (red:1.3) background", "a drawing of a white star on a red background"),
    # another colour, near and far
    ("(yellow:1.4) star", "(orange:1.4) star"),
    ("a (green:1.5) square", "a (purple:1.5) square"),
    ("a large (blue:0.6) square on a (green:1.5) background", "a large blue square on a red background"),
    # another shape or size
    ("a (purple:1.5) ring", "a (purple:1.5) circle"),
    ("a (green:1.5) square", "a (green:1.5) triangle"),
    ("(yellow:1.4) star", "small (yellow:1.4) star"),
    # another place
    ("a (purple:1.5) ring", "a (purple:1.5) ring at the bottom"),
    ("(orange:1.3) triangle (on the left:1.4)", "(orange:1.3) triangle"),
    ("a (blue:1.5) star on the left", "a (blue:1.5) star in the middle"),
    # another background
    ("a (red:1.6) circle", "a (red:1.6) circle on a black background"),
    ("a (green:1.5) square", "a (green:1.5) square on a gray background"),
    # two things
    ("a red circle and a (blue:1.5) square", "a red circle"),
    ("a red circle and a (blue:1.5) square", "a red circle and a yellow square"),
    ("a (purple:1.5) ring", "a (purple:1.5) ring above a red square"),
    # hardly anything: how it begins
    ("a (red:1.6) circle", "a photo of a (red:1.6) circle"),
    # composed
    ("a red circle and a (blue:1.5) square", "a red circle on the left AND a (blue:1.5) square on the right"),
    # Wrong in the first steps only. There sigma moves most, and yet the picture hardly changes, as the steps after them
    # undo it: the weights are of first order and can't know.
    ("a (red:1.6) circle", "a [blue:(red:1.6):0.3] circle"),
)
FITTED = (
    "(red:1.6) circle",
    "a large (blue:0.6) square on a (green:1.5) background",
    "(orange:1.3) triangle (on the left:1.4)",
    "a (purple:1.5) ring",
)
# Of the way from the prompt without weights to what was learnt; beyond 1 it goes too far.
WAY = (0.25, 0.5, 0.75, 1.0, 1.15, 1.3)
NOISE = (0.2, 0.5)  # as shares of the size of the start's vectors

POOLED, WEIGHTED = "every step alike (pooled)", "by what it moves the picture (weighted)"
NUMBERS = {POOLED: False, WEIGHTED: True}


# ---- samplers: noise `[B, c, h, w]` -> finished latents `[B, c, h, w]` --------------------------------------------

Sampler = Callable[[StandaloneSession, Tensor, Sequence[StepConditioning], float], Tensor]


def ddim(session: StandaloneSession, noise: Tensor, guidance: Sequence[StepConditioning], cfg_scale: float) -> Tensor:
    *_, path = session.sample(noise, guidance, cfg_scale)
    return path.final


@torch.no_grad()
def karras(session: StandaloneSession, noise: Tensor, guidance: Sequence[StepConditioning], cfg_scale: float) -> Tensor:
    """DPM++ 2M with Karras's noise levels (Lu et al. 2022, Karras et al. 2022): other steps than those measured at."""
    kept = session.parts.alphas_cumprod.double()
    betas = 1 - kept / torch.cat([torch.ones(1).to(kept), kept[:-1]])
    scheduler = DPMSolverMultistepScheduler(trained_betas=betas.tolist(), use_karras_sigmas=True)
    scheduler.set_timesteps(len(guidance))
    x = noise
    for t, given in zip(scheduler.timesteps, guidance, strict=True):
        timestep = torch.full((len(x),), int(t), device=x.device)
        negative = session.predict_noise(x, timestep, given.negative)
        positive = compose([(w, session.predict_noise(x, timestep, c)) for w, c in given.positive], negative)
        x = scheduler.step(negative + cfg_scale * (positive - negative), t, x).prev_sample
    return x


SAMPLERS: dict[str, Sampler] = {"DDIM": ddim, "DPM++ 2M Karras": karras}
BOTH = "both"


# ---- what is compared ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What stood in a prompt's place, as shares of a reference: the empty prompt, or the prompt without weights.

    numbers: by name, of the predicted noise. truth: by sampler, of the finished latents, and over all of them BOTH.
    """

    prompt: str
    given: str
    numbers: dict[str, float]
    truth: dict[str, float]


class Bench:
    """Measures what stands in a prompt's place. What a prompt alone decides is made once."""

    def __init__(
        self,
        session: StandaloneSession,
        seeds: int,
        *,
        seed: int = 0,
        samplers: dict[str, Sampler] = SAMPLERS,
        steps: int = 20,
        bank_seeds: int = BANK_SEEDS,
    ) -> None:
        self.session, self.seeds, self.seed, self.samplers = session, seeds, seed, samplers
        self.steps, self.bank_seeds = steps, bank_seeds
        self.banks: dict[str, Bank] = {}
        self._targets: dict[str, Target] = {}
        self._finals: dict[str, dict[str, Tensor]] = {}
        self._eps: dict[tuple[str, str], Tensor] = {}

    def between(self, wanted: str, given: str) -> Case:
        """One prompt in another's place, as shares of what the empty prompt does there."""
        bank = self._bank(wanted)

        def predicted() -> Tensor:
            guidance = self._target(given).guidance
            return guided_noise(self.session, bank.x, bank.timestep, bank.step, guidance, negative=False)

        eps = _once(self._eps, (wanted, given), predicted)
        numbers = {name: share_of_empty(eps, bank, weighted=weighted) for name, weighted in NUMBERS.items()}
        finals = [self._final(text) for text in (given, wanted, "")]
        return Case(wanted, given, numbers, self._truth(*finals))

    def among(self, prompt: str, given: str, vectors: Vectors) -> Case:
        """Vectors in a prompt's place, as shares of what the prompt without weights does there."""
        bank, target = self._bank(prompt), self._target(prompt)
        with torch.no_grad():
            embedding = target.embed(self.session, vectors)
        eps = noise_under(self.session, bank.x, bank.timestep, embedding)
        numbers = {
            name: squared(eps, bank, weighted=weighted) / squared(bank.plain, bank, weighted=weighted)
            for name, weighted in NUMBERS.items()
        }
        plain = _once(self._finals, f"{prompt} without weights", lambda: self._sampled(target.plain))
        finals = self._sampled(target.with_embedding(embedding)), self._final(prompt), plain
        return Case(prompt, given, numbers, self._truth(*finals))

    def steady(self, prompt: str) -> bool:
        """Whether a prompt says the same at every sampling step."""
        return all(len(part.texts) == 1 for part in self.session.read(prompt, self.steps))

    def request(self, prompt: str) -> EstimateRequest:
        return EstimateRequest(
            prompt=prompt,
            name="bench",
            use=Use.WHOLE,
            effort=Effort.QUICK,
            seed=self.seed,
            sampling_steps=self.steps,
        )

    def _target(self, prompt: str) -> Target:
        return _once(self._targets, prompt, lambda: build_target(self.request(prompt), self.session))

    def _bank(self, prompt: str) -> Bank:
        """What generations under the prompt meet, from noise that nothing learns from and no picture is made of."""

        def recorded() -> Bank:
            request = self.request(prompt)
            noise = latent_noise(request, self.session, HELD_OUT, self.bank_seeds)
            *_, bank = build_bank(self.session, self._target(prompt), noise, request.cfg_scale)
            return bank

        return _once(self.banks, prompt, recorded)

    def _final(self, prompt: str) -> dict[str, Tensor]:
        return _once(self._finals, prompt, lambda: self._sampled(self._target(prompt).guidance))

    def _sampled(self, guidance: Sequence[StepConditioning]) -> dict[str, Tensor]:
        request = self.request("")
        noise = latent_noise(request, self.session, PICTURES, self.seeds)
        return {
            name: sample(self.session, noise, guidance, request.cfg_scale) for name, sample in self.samplers.items()
        }

    def _truth(self, given: dict[str, Tensor], wanted: dict[str, Tensor], least: dict[str, Tensor]) -> dict[str, float]:
        each = {name: picture_error(given[name], wanted[name], least[name]) for name in self.samplers}
        return each | {BOTH: math.exp(fmean(map(math.log, each.values())))}


def _once(known: dict[Any, T], key: Any, make: Callable[[], T]) -> T:
    if key not in known:
        known[key] = make()
    return known[key]


# ---- vectors better and worse -------------------------------------------------------------------------------------


def ladder(session: StandaloneSession, request: EstimateRequest) -> Iterator[tuple[str, Vectors]]:
    """Vectors for one prompt, bad and good, each with a name."""
    start = initial_vectors(request, session)
    yield from on_the_way(start, learnt(session, request), WAY)
    yield from ((f"without weights, and noise of {size:g}", noisy(start, size, request.seed)) for size in NOISE)
    hidden = learnt(session, replace(request, part=Part.TRANSFORMER))
    yield "text encoder's hidden states alone", hidden


def learnt(session: StandaloneSession, request: EstimateRequest) -> Vectors:
    """What an estimate would end with."""
    cancel, target = Cancel(), build_target(request, session)
    materials = drained(materials_of(request, session, target, cancel))
    start, _ = drained(starting_vectors(request, session, materials, cancel))
    return drained(learn(request, session, materials, start, cancel)).best


def on_the_way(start: Vectors, end: Vectors, shares: Sequence[float]) -> Iterator[tuple[str, Vectors]]:
    for share in shares:
        yield f"{share:g} of the way", {key: torch.lerp(start[key], end[key], share) for key in start}


def noisy(vectors: Vectors, size: float, seed: int) -> Vectors:
    """Vectors with noise of `size` times their own root mean square in every number."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: rows + size * rows.square().mean().sqrt() * torch.randn(rows.shape, generator=generator).to(rows)
        for key, rows in vectors.items()
    }


# ---- how well one thing goes with another -------------------------------------------------------------------------


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: 1 where both have the same order, 0 where one says nothing of the other."""
    ranks = _ranks(a), _ranks(b)
    return 0.0 if any(min(each) == max(each) for each in ranks) else correlation(*ranks)


def log_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson's of the logarithms: 1 where one is a power of the other."""
    return correlation(list(map(math.log, a)), list(map(math.log, b)))


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def predictions(cases: Sequence[Case], name: str, truth: str = BOTH) -> tuple[float, float]:
    """Rank and log correlation of a number with the finished latents."""
    columns = [case.numbers[name] for case in cases], [case.truth[truth] for case in cases]
    return rank_correlation(*columns), log_correlation(*columns)


def ahead(cases: Sequence[Case], seed: int, lists: int = 1000) -> float:
    """Share of lists drawn anew from these cases, with repetition, where the weighted number's rank correlation is
    above the pooled one's: near 0 or 1 where it does not hang on a few cases."""
    rng, won = random.Random(seed), 0
    for _ in range(lists):
        drawn = rng.choices(cases, k=len(cases))
        truth = [case.truth[BOTH] for case in drawn]
        weighted, pooled = (rank_correlation([c.numbers[name] for c in drawn], truth) for name in (WEIGHTED, POOLED))
        won += weighted > pooled
    return won / lists


# ---- the program --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    try:
        host = StandaloneHost(ModelOptions(model=str(args.model)))
        with host.session() as session:
            bench = Bench(session, args.seeds, seed=args.seed)
            pairs = _between_prompts(bench, PAIRS[: args.pairs])
            fits = _among_fits(bench, FITTED[: args.fits])
    except EstimateError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if args.json is not None:
        result = {"model": session.info.name, "seed": args.seed, "seeds": args.seeds, "between": pairs, "among": fits}
        args.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.predicts", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, metavar="FILE", help="checkpoint (the small model)")
    parser.add_argument("--seeds", type=int, default=8, metavar="N", help="pictures per prompt and sampler (8)")
    parser.add_argument("--pairs", type=int, default=len(PAIRS), metavar="N", help="the first N pairs of prompts (all)")
    parser.add_argument("--fits", type=int, default=len(FITTED), metavar="N", help="fits of the first N prompts (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    return parser


def _between_prompts(bench: Bench, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    if not pairs:
        return {}
    print("Between prompts: another prompt in a prompt's place. All as shares of what the empty prompt does there.")
    cases = []
    for wanted, given in pairs:
        cases.append(bench.between(wanted, given))
        _show_progress(len(cases), len(pairs))
    _print_cases(cases)
    if len(cases) < 3:
        return {"cases": [asdict(case) for case in cases]}
    print("\nHow an error of the predicted noise goes with the finished latents, over these pairs:")
    steady = [case for case in cases if bench.steady(case.given)]
    table = {name: _row(cases, name) for name in NUMBERS}
    if 3 <= len(steady) < len(cases):
        table |= {f"{name}, without those that change with the step": _row(steady, name) for name in NUMBERS}
    _print_correlations(table)
    first, second = ([case.truth[name] for case in cases] for name in SAMPLERS)
    samplers = rank_correlation(first, second), log_correlation(first, second)
    print(f"  {' and '.join(SAMPLERS)} with each other: {samplers[0]:.2f} by rank, {samplers[1]:.2f} by logarithm")
    share = ahead(cases, bench.seed)
    print(f"  Weighted is ahead by rank in {100 * share:.0f}% of the lists drawn anew from these pairs.")
    return {"cases": [asdict(case) for case in cases], "predicts": table, "samplers": samplers, "ahead": share}


def _among_fits(bench: Bench, prompts: Sequence[str]) -> dict[str, Any]:
    if not prompts:
        return {}
    print("\nAmong fits of one prompt: better and worse vectors. All as shares of the prompt without its weights.")
    cases, table = [], {}
    for prompt in prompts:
        own = [bench.among(prompt, name, vectors) for name, vectors in ladder(bench.session, bench.request(prompt))]
        table |= {f"{prompt}: {name}": _row(own, name) for name in NUMBERS}
        cases += own
        _show_progress(len(table) // len(NUMBERS), len(prompts))
    _print_cases(cases)
    table |= {f"all of them: {name}": _row(cases, name) for name in NUMBERS}
    print("\nHow an error of the predicted noise goes with the finished latents:")
    _print_correlations(table)
    share = ahead(cases, bench.seed)
    print(f"  Weighted is ahead by rank in {100 * share:.0f}% of the lists drawn anew from all of these.")
    return {"cases": [asdict(case) for case in cases], "predicts": table, "ahead": share}


def _row(cases: Sequence[Case], name: str) -> dict[str, tuple[float, float]]:
    return {truth: predictions(cases, name, truth) for truth in (*SAMPLERS, BOTH)}


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r  {done} of {total}" + ("\r" + " " * 20 + "\r" if done == total else ""))


def _print_cases(cases: Sequence[Case]) -> None:
    """A line per case, under the prompt it was measured against."""
    columns = (*SAMPLERS, BOTH)
    head = ["", "noise, pooled", "noise, weighted", *(f"latents, {column}" for column in columns)]
    lines = []
    for prompt in dict.fromkeys(case.prompt for case in cases):
        lines.append([prompt, *[""] * (len(head) - 1)])
        for case in (case for case in cases if case.prompt == prompt):
            values = (*case.numbers.values(), *(case.truth[column] for column in columns))
            lines.append([f"  {case.given}", *(f"{value:.4f}" for value in values)])
    _print_table(head, lines)


def _print_correlations(table: dict[str, dict[str, tuple[float, float]]]) -> None:
    columns = (*SAMPLERS, BOTH)
    head = ["", *(f"{column}, {kind}" for column in columns for kind in ("rank", "log"))]
    _print_table(head, [[name, *(f"{v:.2f}" for c in columns for v in row[c])] for name, row in table.items()])


def _print_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())
