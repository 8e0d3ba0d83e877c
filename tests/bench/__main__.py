"""`python -m tests.bench`: measures how far each way comes for what cost, and what a step costs."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lib_estimate.errors import EstimateError
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.request import ModelOptions
from tests.bench.compare import AUTO, MARKS, OLD_WAY, PROMPTS, Row, Settings, compare, sooner, summary, worsened
from tests.bench.cost import ATTENTION, DEFAULT, is_large, step_costs
from tests.bench.full_size import SIDE, random_host
from tests.bench.memory import arithmetic
from tests.bench.projection import CARDS, Prices, prices, projections

SMALL_MODEL = Path(__file__).parents[1] / "shapes_sd" / "shapes_sd.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        result = _counted(args) if args.device == "meta" else _measured(args)
    except EstimateError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _write(args.json, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, help="checkpoint (default: the small model)")
    parser.add_argument("--random-full-size", action="store_true", help="only what a step costs, on random weights")
    parser.add_argument("--family", choices=tuple(SIDE), default="sd1", help="of --random-full-size (sd1)")
    parser.add_argument("--cost-only", action="store_true", help="only what a step costs")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), metavar="N", help="the first N of the prompts")
    parser.add_argument(
        "--budget", type=int, default=3000, metavar="FORWARDS",
        help="forward-equivalents that the old way and unet may take; the others end by themselves (3000)",
    )  # fmt: skip
    parser.add_argument("--extra-vectors", type=int, default=0, metavar="N", help="beyond the prompt's tokens (0)")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="seeds whose finished latents count (6)")
    parser.add_argument("--pixels", action="store_true", help="also decode them, for the difference in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda, mps; with --random-full-size also meta, which only counts"
    )
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch on the CPU (1: CPU seconds of several are not comparable)"
    )
    return parser


def _measured(args: argparse.Namespace) -> dict[str, Any]:
    if args.random_full_size:
        host = random_host(args.device, args.dtype, args.family)
    else:
        host = StandaloneHost(ModelOptions(model=str(args.model), device=args.device, dtype=args.dtype))
    with host.session() as session:
        result = _circumstances(session, args)
        print(
            f"{result['model']} on {result['device']}, {result['dtype']}, torch {result['torch']}, "
            f"{result['threads']} thread(s); seconds are {result['seconds_are']}"
        )
        cost = result["cost"] = step_costs(session, args.seed)
        _print_cost(cost)
        if is_large(session):
            result["projection"] = _projected(prices(cost))
        if not args.cost_only and not args.random_full_size:
            _compare(session, args, result)
    return result


def _counted(args: argparse.Namespace) -> dict[str, Any]:
    """Without seconds: what a full-size model of a family calculates."""
    shares = arithmetic(args.family)
    print(
        f"{args.family}, by arithmetic alone: a U-Net forward with its gradient is {shares.pop('with gradient'):.2f} "
        "forwards (counted as 3).\nIn forwards, an evaluation of each objective:"
    )
    _table(["", "forwards"], [[name, f"{share:.4f}"] for name, share in shares.items()])
    given = Prices(
        {name: share for name, share in shares.items() if not name.startswith("check")},
        {name.removeprefix("check, "): share for name, share in shares.items() if name.startswith("check")},
        {},
        shares["picture"],
    )
    return {"family": args.family, "arithmetic": shares, "projection": _projected(given)}


def _circumstances(session: StandaloneSession, args: argparse.Namespace) -> dict[str, Any]:
    device = session.info.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": session.info.name,
        "model_hash": session.info.hash,
        "family": args.family if args.random_full_size else None,
        "device": f"{device} ({name})",
        "dtype": str(session.info.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds_are": "CPU seconds" if device.type == "cpu" else "wall-clock seconds with the device's work finished",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seed": args.seed,
        "budget": args.budget,
        "extra_vectors": args.extra_vectors,
        "images": args.images,
    }


def _compare(session: StandaloneSession, args: argparse.Namespace, result: dict[str, Any]) -> None:
    """All ways on all prompts, into `result`; tables as they come."""
    settings = Settings(args.seed, args.budget, args.extra_vectors, args.images, args.pixels)
    prompts, result["rows"] = PROMPTS[: args.prompts], []
    for number, prompt in enumerate(prompts, 1):
        rows = []
        for row in compare(session, prompt, settings):
            rows.append(row)
            sys.stderr.write(f"  {row['way']}: {row['share']:.4f} left after {row['forward_equivalents']}\n")
        print(f"\n{number}/{len(prompts)}: {prompt}; {rows[0]['vectors']} vectors")
        _print_rows(rows)
        result["rows"] += rows
        result["summary"] = summary(result["rows"])
        result["sooner"] = {way: sooner(result["rows"], way) for way in AUTO}
        result["old_way_worsened"] = worsened(result["rows"])
        _write(args.json, result)  # what is measured so far is not lost
    _print_summary(result)


def _projected(given: Prices) -> dict[str, Any]:
    """What whole estimates cost, counted on the small model; printed."""
    host = StandaloneHost(ModelOptions(model=str(SMALL_MODEL), device="cpu"))
    projection = projections(host, DEFAULT, given)
    _print_projection(projection)
    return projection


def _write(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- tables -------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    for line in (head, *lines):
        cells = [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells).rstrip())


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _print_cost(cost: dict[str, Any]) -> None:
    size, names, steps = cost["size"], list(cost["steps"]), list(cost["steps"].values())
    print(f"\nOne step ({size['latents']} latents, queries per layer {cost['queries_per_layer'][0]}), milliseconds")
    parts = list(dict.fromkeys(part for step in steps for part in step["parts"]))

    def line(name: str, values: Sequence[float | None], digits: int = 2) -> list[str]:
        return [name, *(_number(value, digits) for value in values)]

    def scaled(by: float, key: str) -> list[float | None]:
        return [None if step.get(key) is None else by * step[key] for step in steps]

    lines = [line(p, [1e3 * s["parts"][p] if p in s["parts"] else None for s in steps]) for p in parts]
    lines.append(line("the step", scaled(1e3, "seconds")))
    lines.append(line("evaluations of the loss in it", scaled(1, "evaluations")))
    lines.append(line("one check of the vectors", scaled(1e3, "check_seconds")))
    lines.append(line("set-up of the objective, once", scaled(1e3, "setup_seconds")))
    lines.append(line("one evaluation, in U-Net forwards", scaled(1, "forwards_per_evaluation"), 4))
    lines.append(line("one check, in U-Net forwards", scaled(1, "forwards_per_check"), 4))
    lines.append(line("set-up, in U-Net forwards", scaled(1, "forwards_per_setup"), 4))
    lines.append(line("loop overhead, % of the step", scaled(100, "loop_overhead")))
    lines.append(line("the same with the checks", scaled(100, "loop_overhead_with_checks")))
    lines.append(line("all outside networks, autograd and optimizer, %", scaled(100, "outside_networks")))
    _table(["", *names], lines)
    print(
        f"  a bare U-Net forward: {1e3 * cost['forward_seconds']:.1f} ms per latent; with gradient "
        f"{cost['with_gradient_ratio']:.2f} times that (counted as 3)\n"
        f"  a latent of unet over it with gradient: {cost['denoising_ratio']:.3f}\n"
        f"  a cross-attention evaluation: 1/{1 / cost['steps'][ATTENTION]['forwards_per_evaluation']:.1f} U-Net "
        f"forwards; a picture decoded: {cost['decode_forwards']:.2f}\n"
        f"  peak memory: {_number(cost['peak_memory_mb'], 0)} MB"
    )
    if "cuda" in cost:
        gpu = cost["cuda"]
        print(
            f"  Denoising reaches {gpu['flops_per_second'] / 1e12:.1f} TFLOP/s, {100 * gpu['share_of_peak']:.0f}% of "
            f"the {gpu['peak_flops_per_second'] / 1e12:.0f} measured with a large float16 product"
        )


def _print_projection(projection: dict[str, Any]) -> None:
    print("\nA whole estimate of two pictures, effort normal: forward-equivalents, and seconds on a card whose U-Net")
    print(f"forward takes {', '.join(f'{card:g}' for card in CARDS)} s")
    for use, figures in projection.items():
        parts = figures["forward_equivalents"]
        counts = ", ".join(f"{count} of {kind or 'the U-Net alone'}" for kind, count in figures["evaluations"].items())
        back = f"; taken back {figures['taken_back']} time(s)" if figures["taken_back"] else ""
        print(f"  use {use}; evaluations: {counts}; {figures['pictures']} pictures decoded{back}")
        lines = [[name, f"{n:.1f}", *(f"{card * n:.1f}" for card in CARDS)] for name, n in parts.items() if n]
        total = sum(parts.values())
        lines.append(["all of it", f"{total:.1f}", *(f"{figures['seconds'][str(card)]:.1f}" for card in CARDS)])
        _table(["", "forwards", *(f"{card:g} s" for card in CARDS)], lines)


def _print_rows(rows: list[Row]) -> None:
    lines = [
        [
            row["way"], str(row["forward_equivalents"]), *(_number(share, 3) for share in row["shares"].values()),
            _number(row["share"], 3), _number(row["latents_share"], 3), _number(row["pixel_difference"]),
            _forwards(row["reached_old_way"]),
        ]
        for row in rows
    ]  # fmt: skip
    _table(_head(), lines)
    print(f"  pixel difference without the weights: {_number(rows[0]['unweighted_pixel_difference'])}")


def _head() -> list[str]:
    return ["", "U-Net", *(f"at {mark}" for mark in MARKS), "at its end", "latents", "pixels", f"as the {OLD_WAY}"]


def _forwards(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _print_summary(result: dict[str, Any]) -> None:
    count = len(result["rows"]) // len(result["summary"])
    print(
        f"\nMedians over {count} prompt(s), the worst in brackets. U-Net: forward-equivalents in all; at 50: the\n"
        "share of the unweighted prompt's error that is left after so many, where a way was over before at its end;\n"
        f"latents: the share of its finished latents' error; as the {OLD_WAY}: forward-equivalents until it left as\n"
        f"little as the {OLD_WAY} in the end"
    )

    def both(row: Row, digits: int, *path: str) -> str:
        middle, worst = row, row["worst"]
        for key in path:
            middle, worst = middle[key], worst[key]
        return _number(middle, digits) + ("" if worst is None else f" ({worst:.{digits}f})")

    lines = [
        [
            row["way"], both(row, 0, "forward_equivalents"), *(both(row, 3, "shares", str(mark)) for mark in MARKS),
            both(row, 3, "share"), both(row, 3, "latents_share"), both(row, 4, "pixel_difference"),
            _forwards(row["reached_old_way"]),
        ]
        for row in result["summary"]
    ]  # fmt: skip
    _table(_head(), lines)
    print()
    for way, times in result["sooner"].items():
        each = ", ".join(f"{value:.1f}" for value in times)
        never = f"; never for {times.count(0)}, which count as 0" if 0 in times else ""
        print(f"{way} leaves as little as the {OLD_WAY} in the end with {median(times):.1f} times less ({each}{never})")
    if result["old_way_worsened"]:
        print(
            f"For {result['old_way_worsened']} of {count} prompts the {OLD_WAY} ended worse than it started, so that "
            "the others were there when their recording was done."
        )


if __name__ == "__main__":
    sys.exit(main())
