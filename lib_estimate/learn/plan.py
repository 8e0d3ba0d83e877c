"""Which stages a request is learnt in and with what settings: where 'auto', 'effort' and blanks become numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum

import torch

from lib_estimate.files.embedding import Vectors
from lib_estimate.hosts.base import Network
from lib_estimate.learn.registry import LBFGS_EVALUATIONS
from lib_estimate.request import AUTO, Effort, EstimateRequest, Part, Use


class Goal(str, Enum):
    """What a stage matches."""

    HIDDEN_STATES = "transformer"
    CROSS_ATTENTION = "cross-attention"
    SKETCH = "sketch"
    NOISE = "unet"
    NOISE_AND_SKETCH = "unet and sketch"


RUNS_THE_UNET = (Goal.NOISE, Goal.NOISE_AND_SKETCH)
NETWORKS = {
    Goal.HIDDEN_STATES: (Network.TEXT,),
    Goal.CROSS_ATTENTION: (Network.TEXT, Network.ATTENTION),
    Goal.SKETCH: (Network.TEXT, Network.ATTENTION),
    Goal.NOISE: (Network.TEXT, Network.UNET),
    Goal.NOISE_AND_SKETCH: (Network.TEXT, Network.ATTENTION, Network.UNET),
}


@dataclass(frozen=True)
class Stage:
    """One run of the learning loop. A rate in shares of the vectors' size becomes a learning rate when it starts."""

    goal: Goal
    optimizer: str
    learning_rate: str
    schedule: str
    steps: int
    share: float = 0.0
    latents: int = (
        0  # noisy latents that an optimizer which needs the same loss at every call sees; 0: by the objective
    )

    def sized(self, vectors: Vectors) -> Stage:
        """The stage with its learning rate for vectors `[N, C]` of this size (root mean square of all numbers).

        Adam moves every number by about the learning rate, so what is a small step depends on how large they are, and
        that differs between text encoders: 0.014 in SD1's token table, several times as much in others.
        """
        if self.learning_rate or not self.share:
            return self
        size = torch.cat([rows.detach().float().flatten() for rows in vectors.values()]).square().mean().sqrt()
        return replace(self, learning_rate=f"{self.share * size.item():.2g}")

    def record(self) -> dict:
        """As plain values."""
        about = {key: value for key, value in asdict(self).items() if key not in ("share", "latents", "goal")}
        return {"part": self.goal.value, **about}


LBFGS = "LBFGS"

DEFAULTS = {
    Part.TRANSFORMER: Stage(Goal.HIDDEN_STATES, "Adam", "", "cosine", 300, share=0.08),
    # L-BFGS sees the same few latents, or queries, at every step: a smooth, deterministic problem, which is what it is
    # best at.
    Part.UNET: Stage(Goal.NOISE, LBFGS, "1", "constant", 48, latents=12),
    Part.CROSS_ATTENTION: Stage(Goal.CROSS_ATTENTION, LBFGS, "1", "constant", 80),
}
# Nothing of the prompt's own tokens stays where they have to share vectors: that takes more steps, which run no U-Net.
SQUEEZED_STEPS = 300
# Fresh sentences at every step are noise to L-BFGS.
CROSS_ATTENTION_IN_SENTENCES = Stage(Goal.CROSS_ATTENTION, "Adam", "", "cosine", 300, share=0.05)
SKETCH = Stage(Goal.SKETCH, LBFGS, "1", "constant", 30)
SKETCH_IN_SENTENCES = Stage(Goal.SKETCH, "Adam", "", "cosine", 300, share=0.05)
# The U-Net itself, at the end: the sketch has told L-BFGS the shape of the valley, so a few evaluations go far.
POLISH = {
    Effort.QUICK: None,
    Effort.NORMAL: Stage(Goal.NOISE_AND_SKETCH, LBFGS, "1", "constant", 2, latents=8),
    Effort.BEST: Stage(Goal.NOISE_AND_SKETCH, LBFGS, "1", "constant", 10, latents=20),
}
# Prompts composed with AND: their parts have an attention each, so that only the U-Net itself can be matched.
COMPOSED = {
    Effort.QUICK: Stage(Goal.NOISE, LBFGS, "1", "constant", 1, latents=4),
    Effort.NORMAL: Stage(Goal.NOISE, LBFGS, "1", "constant", 3, latents=8),
    Effort.BEST: Stage(Goal.NOISE, LBFGS, "1", "constant", 18, latents=12),
}
# A LoRA to take over, which may change much: more steps go further than more latents.
TAKING_OVER = {**COMPOSED, Effort.NORMAL: Stage(Goal.NOISE, LBFGS, "1", "constant", 6, latents=4)}


def stages(request: EstimateRequest, *, composed: bool, steady: bool, squeezed: bool = False) -> list[Stage]:
    """The stages of a request, in order.

    composed: the prompt has AND, or a LoRA to take over, which cross-attention can't express. steady: it is the same at
    every step. squeezed: it has more tokens than there are vectors. What the user has set goes for the first stage,
    which is the main one.
    """
    first, *rest = _planned(request, composed, steady)
    if squeezed and rest and first == DEFAULTS[Part.CROSS_ATTENTION]:
        first = replace(first, steps=SQUEEZED_STEPS)
    if request.optimizer != AUTO and request.optimizer != first.optimizer:
        first = _with_optimizer(first, request.optimizer)
    stages = [
        replace(
            first,
            learning_rate=request.learning_rate or first.learning_rate,
            schedule=first.schedule if request.schedule == AUTO else request.schedule,
        ),
        *rest,
    ]
    return _limited(stages, request.steps) if request.steps else stages


def _with_optimizer(stage: Stage, optimizer: str) -> Stage:
    """The stage with another optimizer, at that one's own learning rate, with as many evaluations of the loss."""
    per_step = {LBFGS: LBFGS_EVALUATIONS}
    steps = stage.steps * per_step.get(stage.optimizer, 1) // per_step.get(optimizer, 1)
    return replace(stage, optimizer=optimizer, learning_rate="", share=0.0, steps=max(1, steps))


def _limited(stages: list[Stage], steps: int) -> list[Stage]:
    """The stages with as many steps in all, each with the share it would have had, and at least one."""
    main, *rest = stages[:steps]
    planned = sum(stage.steps for stage in stages)
    rest = [replace(stage, steps=max(1, round(steps * stage.steps / planned))) for stage in rest]
    return [replace(main, steps=steps - sum(stage.steps for stage in rest)), *rest]


def in_sentences(request: EstimateRequest, *, steady: bool) -> bool:
    """Whether the vectors are learnt in random sentences; only a prompt that is the same at every step can be."""
    return steady and request.use is Use.ANYWHERE and request.part in (Part.AUTO, Part.CROSS_ATTENTION)


def _planned(request: EstimateRequest, composed: bool, steady: bool) -> list[Stage]:
    part, polish = request.part, POLISH[request.effort]
    if part is Part.AUTO and composed:
        return [(TAKING_OVER if request.take_over_lora else COMPOSED)[request.effort]]
    if in_sentences(request, steady=steady and not composed):
        return [SKETCH_IN_SENTENCES if part is Part.AUTO else CROSS_ATTENTION_IN_SENTENCES]
    if part is Part.AUTO:
        return [DEFAULTS[Part.CROSS_ATTENTION], SKETCH, *([] if polish is None else [polish])]
    return [DEFAULTS[part]]
