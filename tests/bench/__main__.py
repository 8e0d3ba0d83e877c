"""`python -m tests.bench`: measures how far and how fast each way comes, and what a step costs."""

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
from lib_estimate.request import ModelOptions, Part
from tests.bench.compare import OLD_WAY, PROMPTS, SHARES, Reached, Row, Settings, compare, speedups, summary, worsened
from tests.bench.cost import step_costs
from tests.bench.full_size import random_host

SMALL_MODEL = Path(__file__).parents[1] / "shapes_sd" / "shapes_sd.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        if args.random_full_size:
            host = random_host(args.device, args.dtype)
        else:
            host = StandaloneHost(ModelOptions(model=str(args.model), device=args.device, dtype=args.dtype))
        with host.session() as session:
            result = _measured(session, args)
    except EstimateError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _write(args.json, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures as JSON")
    parser.add_argument("--model", type=Path, default=SMALL_MODEL, help="checkpoint (default: the small model)")
    parser.add_argument("--random-full-size", action="store_true", help="the cost of a step on random SD 1 weights")
    parser.add_argument("--cost-only", action="store_true", help="only what a step costs")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), metavar="N", help="the first N of the prompts")
    parser.add_argument("--budget", type=float, default=60.0, metavar="SECONDS", help="what each way may take (60)")
    parser.add_argument("--extra-vectors", type=int, default=0, metavar="N", help="beyond the prompt's tokens (0)")
    parser.add_argument("--images", type=int, default=4, metavar="N", help="pictures to compare per way (4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "float16", "bfloat16"))
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch on the CPU (1: CPU seconds of several are not comparable)"
    )
    return parser


def _measured(session: StandaloneSession, args: argparse.Namespace) -> dict[str, Any]:
    result = _circumstances(session, args)
    print(
        f"{result['model']} on {result['device']}, {result['dtype']}, torch {result['torch']}, "
        f"{result['threads']} thread(s); seconds are {result['seconds_are']}"
    )
    cost = step_costs(session, args.seed)
    result["cost"] = cost
    result["loop_overhead"] = max(step["loop_overhead"] for step in cost["steps"].values())
    _print_cost(cost)
    if args.cost_only or args.random_full_size:
        return result
    settings = Settings(args.seed, args.budget, args.extra_vectors, args.images)
    prompts = PROMPTS[: args.prompts]
    for number, prompt in enumerate(prompts, 1):
        print(f"\n{number}/{len(prompts)}: {prompt}")
        rows = []
        for row in compare(session, prompt, settings):
            rows.append(row)
            sys.stderr.write(f"  {row['way']}: error {row['error']:.4f} after {row['seconds']:.1f} s\n")
        result["rows"] += rows
        _print_rows(rows)
        _sum_up(result)
        _write(args.json, result)  # what is measured so far is not lost
    _print_summary(result)
    return result


def _circumstances(session: StandaloneSession, args: argparse.Namespace) -> dict[str, Any]:
    device = session.info.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "model": session.info.name,
        "model_hash": session.info.hash,
        "device": f"{device} ({name})",
        "dtype": str(session.info.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seconds_are": "CPU seconds" if device.type == "cpu" else "wall-clock seconds with the device's work finished",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "seed": args.seed,
        "budget": args.budget,
        "extra_vectors": args.extra_vectors,
        "speedup_to_equal_error": None,
        "loop_overhead": None,
        "rows": [],
    }


def _sum_up(result: dict[str, Any]) -> None:
    each = speedups(result["rows"], result["budget"])
    result["speedups"] = each
    result["speedup_to_equal_error"] = median(each)
    result["never_reached"] = sum(not value for value in each)
    result["old_way_worsened"] = worsened(result["rows"])
    result["summary"] = summary(result["rows"])


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


def _when(reached: Reached | None) -> str:
    """Seconds and U-Net samples."""
    return "never" if reached is None else f"{reached['seconds']:.2f} s/{reached['forwards']:.0f}"


def _print_cost(cost: dict[str, Any]) -> None:
    print(f"\nOne step (batch {cost['size']['batch']}, queries per layer {cost['queries_per_layer'][0]}), milliseconds")
    parts = list(dict.fromkeys(part for step in cost["steps"].values() for part in step["parts"]))
    steps = list(cost["steps"].values())

    def line(name: str, values: Sequence[float | None], digits: int = 2) -> list[str]:
        return [name, *("-" if value is None else f"{value:.{digits}f}" for value in values)]

    lines = [line(p, [1e3 * s["parts"][p] if p in s["parts"] else None for s in steps]) for p in parts]
    lines.append(line("the step", [1e3 * s["seconds"] for s in steps]))
    lines.append(line("evaluations of the loss in it", [s["evaluations"] for s in steps]))
    lines.append(line("checks, per step", [1e3 * s["checks_seconds"] if s["checks_seconds"] else None for s in steps]))
    shares = {
        "loop overhead, % of the step": "loop_overhead",
        "the same with the checks": "loop_overhead_with_checks",
        "all outside networks, autograd and optimizer, %": "outside_networks",
    }
    for name, key in shares.items():
        lines.append(line(name, [None if s[key] is None else 100 * s[key] for s in steps]))
    _table(["", *cost["steps"]], lines)
    print(
        f"  a bare U-Net forward and backward: {1e3 * cost['bare_seconds_per_sample']:.1f} ms per sample\n"
        f"  Denoising's sample over it: {cost['denoising_ratio']:.3f}\n"
        f"  one cross-attention evaluation over it: 1/{1 / cost['cross_attention_step_ratio']:.1f}; "
        f"one step of L-BFGS, here {cost['steps']['CrossAttention']['evaluations']:.1f} evaluations: "
        f"1/{1 / cost['cross_attention_optimizer_step_ratio']:.1f}\n"
        f"  the default bank: {cost['bank_forwards']} U-Net samples\n"
        f"  peak memory: {_number(cost['peak_memory_mb'], 0)} MB"
    )
    if "cuda" in cost:
        gpu = cost["cuda"]
        print(
            f"  Denoising reaches {gpu['flops_per_second'] / 1e12:.1f} TFLOP/s, {100 * gpu['share_of_peak']:.0f}% of "
            f"the {gpu['peak_flops_per_second'] / 1e12:.0f} measured with a large float16 product"
        )


def _print_rows(rows: list[Row]) -> None:
    print(
        f"  unweighted: error {_number(rows[0]['unweighted_error'])}, pixel difference "
        f"{_number(rows[0]['unweighted_pixel_difference'])}; {rows[0]['vectors']} vectors"
    )
    head = ["", "seconds", "set-up", "steps", "U-Net", "error", "recovered", "pixels", *_reach_head()]
    lines = [
        [
            row["way"], f"{row['seconds']:.1f}", f"{row['setup_seconds']:.2f}", str(row["steps"]),
            str(row["forward_equivalents"]), _number(row["error"]), _number(row["recovered"], 2),
            _number(row["pixel_difference"]), *_reach_cells(row),
        ]
        for row in rows
    ]  # fmt: skip
    _table(head, lines)


def _reach_head() -> list[str]:
    return [*(f"to {share:g}" for share in SHARES), "to the old way's"]


def _reach_cells(row: Row) -> list[str]:
    return [*(_when(row["reached"].get(str(share))) for share in SHARES), _when(row["reached_old_way"])]


def _print_summary(result: dict[str, Any]) -> None:
    count = len(result["speedups"])
    print(
        f"\nMedians over {count} prompt(s). 'to 0.25': seconds and U-Net forward-equivalents until the error was that"
    )
    print("share of the unweighted prompt's; 'left': the share at the end")
    head = ["", "seconds", "set-up", "U-Net", "error", "left", "recovered", "pixels", *_reach_head()]
    lines = [
        [
            row["way"], _number(row["seconds"], 1), _number(row["setup_seconds"], 2),
            _number(row["forward_equivalents"], 0), _number(row["error"]), _number(row["share_left"], 3),
            _number(row["recovered"], 2), _number(row["pixel_difference"]), *_reach_cells(row),
        ]
        for row in result["summary"]
    ]  # fmt: skip
    _table(head, lines)
    never, budget = result["never_reached"], result["budget"]
    print(
        f"\n{Part.AUTO.value} reaches the error that the {OLD_WAY} has after {budget:g} s "
        f"{result['speedup_to_equal_error']:.1f} times sooner (median; per prompt: "
        f"{', '.join(f'{value:.1f}' for value in result['speedups'])})"
    )
    if never:
        print(f"It never reached it for {never} of {count} prompts, which count as 0.")
    if result["old_way_worsened"]:
        print(
            f"For {result['old_way_worsened']} of {count} prompts the {OLD_WAY} ended worse than it started, so that "
            f"{Part.AUTO.value} was there when its set-up was done."
        )


if __name__ == "__main__":
    sys.exit(main())
