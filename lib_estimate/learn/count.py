"""How many vectors, where the number is to be found by trial."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lib_estimate.hosts.base import Network, Session
from lib_estimate.learn import plan
from lib_estimate.learn.fit import Fit
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import Lessons, noise_validator
from lib_estimate.learn.starts import best_start
from lib_estimate.progress import Cancel, Interrupted, Note, Phase
from lib_estimate.request import AUTO_VECTORS, Effort, EstimateRequest, Part, Start, Use
from lib_estimate.target.recording import Material, place

KNEE = 1.5  # times the least error: what more vectors bring beyond that is not worth their tokens
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
TRIAL_STEPS = 20


def starting_vectors(
    request: EstimateRequest, session: Session, materials: list[Material], cancel: Cancel
) -> Iterator[Phase | Note]:
    """The vectors to start from, and where their number was chosen by trial, the error each number left."""
    if request.vectors != AUTO_VECTORS:
        return (yield from best_start(request, session, materials)), {}
    most = len(next(iter(initial_vectors(replace(request, vectors="init_text"), session).values())))
    candidates = [*(count for count in COUNTS if count < most), most]
    noise, errors = noise_validator(materials), {}
    trial = replace(plan.DEFAULTS[Part.CROSS_ATTENTION], steps=TRIAL_STEPS)
    if materials[0].target.composed():
        trial = plan.COMPOSED[Effort.QUICK]
    lessons = Lessons(replace(request, use=Use.WHOLE), session, materials)
    place(materials, *plan.NETWORKS[trial.goal], Network.UNET)  # which looks at each number's best
    for number, count in enumerate(candidates):
        yield Phase("Trying numbers", number, len(candidates))
        start = initial_vectors(replace(request, vectors=count, start=Start.POOLED), session)
        objective, validate = lessons.of(trial)
        fit = Fit(trial, replace(request, warmup=0), objective, start, validate, cancel)
        for _ in fit.run():
            pass
        errors[count] = noise(fit.best)
        if cancel.wanted is not None:
            raise Interrupted("Interrupted before the learning began. Nothing was saved.")
        if errors[count] <= request.tolerance:
            break
    count = knee(errors, request.tolerance)
    table = ", ".join(f"{n}: {error:.4f}" for n, error in errors.items())
    yield Note(f"{count} vectors are used. Error by number of vectors, after a short trial: {table}.")
    chosen = replace(request, vectors=count, start=Start.POOLED)
    return (yield from best_start(chosen, session, materials)), errors


def knee(errors: dict[int, float], tolerance: float) -> int:
    """The least number whose error is within the tolerance or, where none is, not far from the least of all."""
    enough = max(tolerance, KNEE * min(errors.values()))
    return next(count for count, error in sorted(errors.items()) if error <= enough)
