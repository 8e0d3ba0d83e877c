"""What a whole estimate costs in forward-equivalents, and so in seconds on a card whose U-Net forward is known.

What it runs is counted on the small model: U-Net forwards, evaluations of the losses, checks, pictures. None of these
depends on the model but for where L-BFGS's line search ends. What each of them costs is that of the model measured.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.job import Outcome, estimate
from lib_estimate.learn import learning
from lib_estimate.learn.fit import Fit
from lib_estimate.request import EstimateRequest, Use
from tests.bench.cost import KINDS, kind_of

CARDS = (0.05, 0.1, 0.3)  # seconds of a U-Net forward


@dataclass(frozen=True)
class Estimate:
    """What a whole estimate runs. Forward-equivalents by part of the job; the others by the kind of objective."""

    forwards: Mapping[str, int]
    evaluations: Mapping[str, int]  # of a loss with its gradient
    checks: Mapping[str, int]  # of vectors by what is not learnt from
    stages: Mapping[str, int]
    pictures: int  # decoded
    taken_back: int  # how often the report went back towards the start, and measured again


@dataclass(frozen=True)
class Prices:
    """What these cost in forward-equivalents, beside the U-Net's own."""

    evaluation: Mapping[str, float]
    check: Mapping[str, float]
    setup: Mapping[str, float]  # of an objective and its check, once in a stage
    picture: float


def counted(request: EstimateRequest, host: StandaloneHost) -> Estimate:
    """Runs an estimate to see what it takes. Its file goes nowhere."""
    evaluations, checks, stages, pictures = Counter(), Counter(), Counter(), []
    decode = StandaloneSession.decode

    class Counted(Fit):
        def _gradients(self, *arguments: Any) -> Tensor:
            evaluations[kind_of(self.stage.goal, request.use)] += 1
            return super()._gradients(*arguments)

        def __post_init__(self) -> None:
            stages[kind_of(self.stage.goal, request.use)] += 1
            checks[kind_of(self.stage.goal, request.use)] += 1  # of the vectors it starts from
            super().__post_init__()

        def _check(self, vectors: Vectors) -> float:
            checks[kind_of(self.stage.goal, request.use)] += 1
            return super()._check(vectors)

    def decoded(session: StandaloneSession, latents: Tensor) -> Tensor:
        pictures.extend(latents)
        return decode(session, latents)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(learning, "Fit", Counted),
        mock.patch.object(StandaloneSession, "decode", decoded),
    ):
        *_, outcome = estimate(replace(request, out=folder), host)
    assert isinstance(outcome, Outcome)
    return Estimate(outcome.record["forwards"], evaluations, checks, stages, len(pictures), outcome.fidelity.taken)


def prices(cost: dict[str, Any]) -> Prices:
    """Those of what `cost.step_costs` measured."""
    steps = {name: step for name, step in cost["steps"].items() if not KINDS[name].runs_the_unet()}
    return Prices(
        {name: step["forwards_per_evaluation"] for name, step in steps.items()},
        {name: step["forwards_per_check"] for name, step in steps.items()},
        {name: step["forwards_per_setup"] for name, step in steps.items()},
        cost["decode_forwards"],
    )


def projected(estimate: Estimate, prices: Prices) -> dict[str, float]:
    """Forward-equivalents of a whole estimate by what they are spent on."""

    def bill(price: Mapping[str, float], counts: Mapping[str, int]) -> float:
        return sum(price.get(kind, 0.0) * count for kind, count in counts.items())

    return {
        **{f"{part}: U-Net": float(count) for part, count in estimate.forwards.items()},
        "learning: losses without the U-Net": bill(prices.evaluation, estimate.evaluations),
        "learning: their checks": bill(prices.check, estimate.checks),
        "learning: their set-up": bill(prices.setup, estimate.stages),
        "report: pictures decoded": prices.picture * estimate.pictures,
    }


def projections(host: StandaloneHost, request: EstimateRequest, prices: Prices) -> dict[str, Any]:
    """The default estimate, and the same for use as the whole prompt, as plain values."""
    out = {}
    for use in (Use.ANYWHERE, Use.WHOLE):
        run = counted(replace(request, use=use), host)
        parts = projected(run, prices)
        out[use.value] = {
            "evaluations": dict(run.evaluations),
            "checks": dict(run.checks),
            "pictures": run.pictures,
            "taken_back": run.taken_back,
            "forward_equivalents": parts,
            "seconds": {str(card): card * sum(parts.values()) for card in CARDS},
        }
    return out
