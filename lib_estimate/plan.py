"""Which stages a request is learnt in, and with what settings: where 'auto' and blanks become numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from lib_estimate.request import AUTO, EstimateRequest, Part, Use


@dataclass(frozen=True)
class Stage:
    """One run of the learning loop."""

    part: Part
    optimizer: str
    learning_rate: str
    schedule: str
    steps: int

    def record(self) -> dict:
        return {**asdict(self), "part": self.part.value}


DEFAULTS = {
    Part.TRANSFORMER: Stage(Part.TRANSFORMER, "Adam", "0.005", "cosine", 300),
    Part.UNET: Stage(Part.UNET, "Adam", "0.01", "cosine", 300),
    # L-BFGS sees the same few queries at every step: a smooth, deterministic problem, which is what it is best at.
    Part.CROSS_ATTENTION: Stage(Part.CROSS_ATTENTION, "LBFGS", "1", "constant", 120),
}
# Fresh sentences at every step are noise to L-BFGS.
IN_SENTENCES = Stage(Part.CROSS_ATTENTION, "Adam", "0.003", "cosine", 300)
# The polish starts near the goal, so it takes small steps.
POLISH = Stage(Part.UNET, "Adam", "0.002", "cosine", 90)


def stages(request: EstimateRequest, *, composed: bool, steady: bool) -> list[Stage]:
    """The stages of a request, in order.

    composed: the prompt has AND, which cross-attention can't express. steady: it is the same at every step. What the
    user has set goes for the first stage, which is the main one.
    """
    first, *rest = _planned(request, composed, steady)
    if request.optimizer != AUTO and request.optimizer != first.optimizer:
        first = replace(first, optimizer=request.optimizer, learning_rate="")
    chosen = {
        "learning_rate": request.learning_rate or first.learning_rate,
        "schedule": first.schedule if request.schedule == AUTO else request.schedule,
        "steps": request.steps or first.steps,
    }
    return [replace(first, **chosen), *rest]


def _planned(request: EstimateRequest, composed: bool, steady: bool) -> list[Stage]:
    in_sentences = request.use is Use.ANYWHERE and steady and not composed
    if request.part is Part.CROSS_ATTENTION or (request.part is Part.AUTO and not composed):
        if in_sentences:
            # A polish over the prompt alone would undo what the sentences taught.
            return [IN_SENTENCES]
        polish = [POLISH] if request.part is Part.AUTO else []
        return [DEFAULTS[Part.CROSS_ATTENTION], *polish]
    return [DEFAULTS[Part.UNET if request.part is Part.AUTO else request.part]]


def trajectories(request: EstimateRequest) -> int:
    """How many generations are learnt from: one is enough for cross-attention, the U-Net part gains from more."""
    return request.trajectories or (4 if request.part is Part.UNET else 1)
