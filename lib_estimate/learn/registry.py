"""What can be chosen: optimizers, losses and learning-rate schedules, each name with a factory and complete arguments.

The names and their help are in `choices.py`. Steps are counted from 0, as in the loop.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lib_estimate.errors import RequestError

# ---- optimizers ---------------------------------------------------------------------------------------------------

# A run has a few hundred steps and its gradient falls by orders of magnitude. The usual 0.999 remembers a thousand
# steps, so the large first gradients would hold every later step small.
BETAS = (0.9, 0.95)

MakeOptimizer = Callable[[list[Tensor], float], Optimizer]


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer of the menu, for vectors `[N, width]` of a token table's size and a loss of order 1.

    closure: it evaluates the loss several times in a step, so it needs a closure and the same samples at every call.
    package: what pip installs for it; None for one that torch has.
    """

    make: MakeOptimizer
    default_lr: float
    closure: bool = False
    package: str | None = None


def _torch(kind: type[Optimizer], **arguments) -> MakeOptimizer:
    return lambda parameters, rate: kind(parameters, lr=rate, **arguments)


def _lion(parameters: list[Tensor], rate: float) -> Optimizer:
    """Step by the sign of the gradient's average (Chen et al. 2023, arXiv 2302.06675)."""
    from lion_pytorch import Lion

    return Lion(parameters, lr=rate, betas=BETAS, weight_decay=0.0)


def _prodigy(parameters: list[Tensor], rate: float) -> Optimizer:
    """Adam times an estimate of the distance to the goal (Mishchenko and Defazio 2023, arXiv 2306.06101).

    d0 is a hundredth of a token vector's numbers, because a short run has no steps to spare for growing from 1e-6. The
    estimate must stay free of the learning rate (safeguard_warmup), which warm-up and schedules change.
    """
    from prodigyopt import Prodigy

    return Prodigy(
        parameters, lr=rate, betas=BETAS, d0=1e-4, d_coef=2.0, use_bias_correction=True, safeguard_warmup=True
    )


LBFGS_EVALUATIONS = 4  # of the loss in one step of L-BFGS: one in each of its inner iterations

OPTIMIZERS: dict[str, OptimizerEntry] = {
    "Adam": OptimizerEntry(_torch(torch.optim.Adam, betas=BETAS), 0.005),
    # A loss hardly feels some directions, and noise lets the vectors drift there. This decay takes about 4% of their
    # length in 300 steps at the default rate: enough to hold them, too little to pull at what the loss wants.
    "AdamW": OptimizerEntry(_torch(torch.optim.AdamW, betas=BETAS, weight_decay=0.05), 0.005),
    "SGD": OptimizerEntry(_torch(torch.optim.SGD, momentum=0.9, nesterov=True), 0.01),
    "RMSprop": OptimizerEntry(_torch(torch.optim.RMSprop, alpha=0.9), 0.003),
    "NAdam": OptimizerEntry(_torch(torch.optim.NAdam, betas=BETAS), 0.005),
    "RAdam": OptimizerEntry(_torch(torch.optim.RAdam, betas=BETAS), 0.01),
    "Adagrad": OptimizerEntry(_torch(torch.optim.Adagrad), 0.03),
    "Adadelta": OptimizerEntry(_torch(torch.optim.Adadelta, rho=0.9, eps=1e-6), 2.0),
    "Adamax": OptimizerEntry(_torch(torch.optim.Adamax, betas=BETAS), 0.01),
    # The rate is only the first step length; 0.03 is as large as a token vector's numbers, more is too far.
    "Rprop": OptimizerEntry(_torch(torch.optim.Rprop, etas=(0.5, 1.2), step_sizes=(1e-7, 0.03)), 0.002),
    "ASGD": OptimizerEntry(_torch(torch.optim.ASGD, lambd=1e-4, alpha=0.75), 0.05),
    # So few keep a step short enough to interrupt; the curvature it has learnt lives on between steps.
    "LBFGS": OptimizerEntry(
        _torch(torch.optim.LBFGS, max_iter=LBFGS_EVALUATIONS, history_size=100, line_search_fn="strong_wolfe"),
        1.0,
        closure=True,
    ),
    "Lion": OptimizerEntry(_lion, 0.002, package="lion-pytorch"),
    "Prodigy": OptimizerEntry(_prodigy, 1.0, package="prodigyopt"),
}


def available_optimizers() -> tuple[str, ...]:
    """Names whose package is there, in the menu's order."""
    return tuple(name for name in OPTIMIZERS if missing_package(name) is None)


def missing_package(name: str) -> str | None:
    """What pip would have to install for this optimizer; None where nothing is missing."""
    package = _entry(name).package
    if package is None or importlib.util.find_spec(package.replace("-", "_")) is not None:
        return None
    return package


def default_learning_rate(name: str) -> float:
    """A rate that works for vectors of a token table's size and a smooth loss of order 1, whatever the width."""
    return _entry(name).default_lr


def make_optimizer(name: str, parameters: list[Tensor], learning_rate: float) -> Optimizer:
    """The optimizer over `parameters`, each `[N, width]`, in one group whose "lr" a caller may set at every step."""
    entry, missing = _entry(name), missing_package(name)
    if missing is not None:
        raise RequestError(f"Optimizer {name!r} needs the package {missing}: pip install {missing}, or choose another.")
    try:
        return entry.make(parameters, learning_rate)
    except ImportError as error:
        raise RequestError(
            f"Optimizer {name!r}: the package {entry.package} is installed but can't be loaded ({error}). "
            f"Install it again: pip install --force-reinstall --no-deps {entry.package}, or choose another optimizer."
        ) from error


def _entry(name: str) -> OptimizerEntry:
    return _choice("optimizer", name, OPTIMIZERS)


def _choice(kind: str, name: str, table: dict):
    if name not in table:
        raise RequestError(f"There is no {kind} {name!r}: choose one of {', '.join(table)}.")
    return table[name]


# ---- losses -------------------------------------------------------------------------------------------------------

SMOOTH_L1_BELOW = 0.1
HUBER_BELOW = 1.0
COSINE_EPS = 1e-6  # length below which a vector has no direction


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """mean (p - t)^2: `[B, ...]`, `[B, ...]` -> `[B]`, float32."""
    return F.mse_loss(*_samples(prediction, target), reduction="none").mean(1)


def l1(prediction: Tensor, target: Tensor) -> Tensor:
    """mean |p - t|: `[B, ...]`, `[B, ...]` -> `[B]`, float32."""
    return F.l1_loss(*_samples(prediction, target), reduction="none").mean(1)


def smooth_l1(prediction: Tensor, target: Tensor) -> Tensor:
    """mean of d^2 / 2b where d = |p - t| < b, else d - b/2, b = 0.1: `[B, ...]`, `[B, ...]` -> `[B]`, float32."""
    return F.smooth_l1_loss(*_samples(prediction, target), reduction="none", beta=SMOOTH_L1_BELOW).mean(1)


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """mean of d^2 / 2 where d = |p - t| < c, else c (d - c/2), c = 1: `[B, ...]`, `[B, ...]` -> `[B]`, float32.

    Ten times the threshold of `smooth_l1`: with the same one the two would differ by a factor only.
    """
    return F.huber_loss(*_samples(prediction, target), reduction="none", delta=HUBER_BELOW).mean(1)


def cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cos(p, t) over the flattened sample: `[B, ...]`, `[B, ...]` -> `[B]`, float32. It ignores the length.

    Computed as |p/|p| - t/|t||^2 / 2, which is the same but exactly 0 at a match and without cancellation near it.
    """
    prediction, target = _samples(prediction, target)
    return (_unit(prediction) - _unit(target)).square().sum(1) / 2


def _unit(x: Tensor) -> Tensor:
    """Rows `[B, n]` at length 1, with a finite gradient at zero too."""
    return x / (x.square().sum(1, keepdim=True) + COSINE_EPS**2).sqrt()


def _samples(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both `[B, ...]` as float32 `[B, n]`; unequal shapes would broadcast into a loss that means nothing."""
    if prediction.shape != target.shape:
        raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
    return prediction.float().reshape(len(prediction), -1), target.float().reshape(len(target), -1)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "MSE": mse,
    "L1": l1,
    "SmoothL1": smooth_l1,
    "Huber": huber,
    "cosine": cosine,
}


# ---- learning rates -----------------------------------------------------------------------------------------------


def constant(step: int, steps: int) -> float:
    """1."""
    return 1.0


def cosine_decay(step: int, steps: int) -> float:
    """(1 + cos(pi step / steps)) / 2, from 1 to 0 (Loshchilov and Hutter 2016, arXiv 1608.03983)."""
    return (1 + math.cos(math.pi * _share(step, steps))) / 2


def linear_decay(step: int, steps: int) -> float:
    """1 - step / steps."""
    return 1 - _share(step, steps)


def _share(step: int, steps: int) -> float:
    return min(max(step / max(steps, 1), 0.0), 1.0)


SCHEDULES: dict[str, Callable[[int, int], float]] = {
    "constant": constant,
    "cosine": cosine_decay,
    "linear": linear_decay,
}


def learning_rate_at(rate: str | float, schedule: str, warmup: int, steps: int) -> Callable[[int], float]:
    """step -> rate(step) * (step + 1) / warmup during warm-up, then rate(step) * schedule over the steps that are left.

    A warm-up longer than the run rises until the run ends.
    """
    rate_at, factor = parse_learning_rate(str(rate), steps), _choice("schedule", schedule, SCHEDULES)

    def at(step: int) -> float:
        if step < warmup:
            return rate_at(step) * (step + 1) / warmup
        return rate_at(step) * factor(step - warmup, steps - warmup)

    return at


def parse_learning_rate(text: str, steps: int) -> Callable[[int], float]:
    """The webui's notation: `0.005:100, 1e-3:400, 1e-5` is 0.005 for the first 100 steps, 1e-3 to the 400th, then 1e-5.

    Steps are counted from 0 here, so 1e-3 begins at step 100. A rate without a step, or with -1, lasts to the end. The
    webui ends its training after the last step named; here the length of a run is a field of its own, so the last rate
    stays. Unlike the webui, which drops them silently, pieces that could never take effect are errors.
    """
    pieces = [piece.strip() for piece in text.split(",") if piece.strip()]
    if not pieces:
        raise RequestError("The learning rate is empty: type a number, such as 0.005, or 0.005:100, 1e-3:1000, 1e-5.")
    stages: list[tuple[float, int]] = []  # each rate holds while step < its end
    for position, piece in enumerate(pieces):
        rate, end = _rate_and_end(piece)
        if end is None and position + 1 < len(pieces):
            raise _bad(pieces[position + 1], f"is never reached, because {piece!r} before it lasts to the end")
        if end is not None and stages and end <= stages[-1][1]:
            raise _bad(piece, f"ends at step {end}, but the one before it ends at step {stages[-1][1]}")
        stages.append((rate, steps if end is None else end))
    return lambda step: next((rate for rate, end in stages if step < end), stages[-1][0])


def _rate_and_end(piece: str) -> tuple[float, int | None]:
    """Of `0.005:100` 0.005 and 100; of `1e-5` and of `1e-5:-1` 1e-5 and None."""
    number, colon, until = piece.partition(":")
    try:
        rate = float(number)
    except ValueError:
        raise _bad(piece, f"has no number where the rate belongs: {number.strip()!r}") from None
    if not (math.isfinite(rate) and rate > 0):
        raise _bad(piece, "has a rate that is not above zero")
    if not colon:
        return rate, None
    try:
        end = int(until)
    except ValueError:
        raise _bad(piece, f"has no whole number where the step belongs: {until.strip()!r}") from None
    if end < 1 and end != -1:
        raise _bad(piece, f"ends at step {end}: steps are counted from 1, -1 is the end of the run")
    return rate, None if end == -1 else end


def _bad(piece: str, why: str) -> RequestError:
    return RequestError(
        f"Learning rate: {piece!r} {why}. Write a number, such as 0.005, or rates with the step each lasts to: "
        "0.005:100, 1e-3:1000, 1e-5."
    )
