"""What every host's U-Net has in common: its cross-attention layers, and the way from noise to a picture.

Both the ldm U-Net of the webuis and diffusers' call the layer through which the text comes in `attn2`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib_estimate.hosts.base import Conditioning, Sensitivity, StepConditioning, Trajectory, Watch, compose

PredictNoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
FORWARD, WITH_GRADIENT, RECOMPUTED = 1, 3, 4  # cost of one latent: a backward costs two forwards


def cost(conditioning: Conditioning, recomputed: bool) -> int:
    """Forward-equivalents of one latent through the U-Net, as autograd stands."""
    if not torch.is_grad_enabled() or not conditioning.hidden.requires_grad:
        return FORWARD
    return RECOMPUTED if recomputed else WITH_GRADIENT


class AtOnce:
    """How many latents go through the U-Net together where no gradient is kept: half as many from each time on that
    memory runs out."""

    MOST = 16

    def __init__(self) -> None:
        self.count = self.MOST

    def run(self, predict: PredictNoise, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """eps `[B, c, h, w]` of latents x `[B, c, h, w]`; with a gradient, of all of them together."""
        if torch.is_grad_enabled() and conditioning.hidden.requires_grad:
            return predict(x, timestep, conditioning)
        given = conditioning.expand(len(x))
        while True:
            pieces = [slice(first, first + self.count) for first in range(0, len(x), self.count)]
            try:
                return torch.cat([predict(x[at], timestep[at], given.rows(at)) for at in pieces])
            except torch.cuda.OutOfMemoryError:
                if min(self.count, len(x)) == 1:
                    raise
            self.count = min(self.count, len(x)) // 2
            torch.cuda.empty_cache()


def attention_modules(unet: nn.Module) -> list[nn.Module]:
    """`attn2` of every transformer block, in the order of the U-Net's modules."""
    blocks = (getattr(module, "attn2", None) for module in unet.modules())
    return [attention for attention in blocks if attention is not None]


@contextmanager
def watching(unet: nn.Module, watch: Watch | None, step: int) -> Iterator[None]:
    """Lets `watch` see what enters the cross-attention layers."""
    if watch is None:
        yield
        return
    handles = [
        module.register_forward_pre_hook(lambda _, args, layer=layer: watch(step, layer, args[0]))
        for layer, module in enumerate(attention_modules(unet))
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sensitivity(
    unet: nn.Module, predict_noise: PredictNoise, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor
) -> Sensitivity:
    """See `Session.sensitivity`. The conditioning takes the gradient for it, as nothing else does."""
    given = conditioning.expand(len(x))
    hidden = given.hidden.detach().clone().requires_grad_(True)
    pooled = None if given.pooled is None else given.pooled.detach().clone().requires_grad_(True)
    entered: dict[int, Tensor] = {}
    left: dict[int, Tensor] = {}

    def see(layer: int, args: tuple, out: Tensor) -> None:
        if layer not in left:  # computed again for the gradient, a block passes here once more
            entered[layer], left[layer] = args[0].detach(), out

    modules = attention_modules(unet)
    handles = [
        module.register_forward_hook(lambda _, args, out, layer=layer: see(layer, args, out))
        for layer, module in enumerate(modules)
    ]
    try:
        with torch.enable_grad():
            eps = predict_noise(x, timestep, replace(conditioning, hidden=hidden, pooled=pooled))
            layers = range(len(modules))
            # The text's own gradient is asked for, too: what is computed again for it, with copies of weights where
            # they come and go, would otherwise stay until the end.
            inputs = [*(left[layer] for layer in layers), hidden, *([] if pooled is None else [pooled])]
            gradients = torch.autograd.grad((eps * probe).sum(), inputs)
    finally:
        for handle in handles:
            handle.remove()
    return Sensitivity(
        [entered[layer] for layer in layers],
        list(gradients[: len(modules)]),
        None if pooled is None else gradients[-1],
        eps.detach(),
    )


# What tells a block, of ldm's U-Net and of diffusers': transformer blocks, and residual blocks with their timestep.
MARKS = ("attn2", "emb_layers", "time_emb_proj")


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    """The blocks that hold nearly all of a U-Net's weights and activations."""
    return [module for module in unet.modules() if any(hasattr(module, mark) for mark in MARKS)]


class Recomputed:
    """Gradient checkpointing (Chen et al. 2016): the U-Net's blocks keep only what enters them, and run again for the
    gradient. About a third slower, for a fraction of the memory. `restore` puts the blocks' own methods back.

    `prepare` is called with a block before each of its runs, the second one for the gradient included. adds_in_place:
    the blocks add to their own input, as Forge's do, and must be run again from what they were given.
    """

    def __init__(
        self, unet: nn.Module, prepare: Callable[[nn.Module], None] | None = None, adds_in_place: bool = False
    ) -> None:
        self.blocks = blocks_of(unet)
        self.before = [vars(block).get("forward") for block in self.blocks]
        for block in self.blocks:
            forward = block.forward if prepare is None else partial(self._prepared, prepare, block, block.forward)
            block.forward = partial(self._run, partial(self._of_a_clone, forward) if adds_in_place else forward)

    @staticmethod
    def _of_a_clone(forward: Callable[..., Tensor], x: Tensor, *given: Any, **named: Any) -> Tensor:
        return forward(x.clone(), *given, **named)

    @staticmethod
    def _prepared(
        prepare: Callable[[nn.Module], None],
        block: nn.Module,
        forward: Callable[..., Tensor],
        *given: Any,
        **named: Any,
    ) -> Tensor:
        prepare(block)
        return forward(*given, **named)

    @staticmethod
    def _run(forward: Callable[..., Tensor], *given: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(*given, **named)
        return checkpoint(forward, *given, use_reentrant=False, **named)

    def restore(self) -> None:
        for block, before in zip(self.blocks, self.before, strict=True):
            if before is None:
                del block.forward
            else:
                block.forward = before


def noise_of_velocity(v: Tensor, x: Tensor, abar: Tensor) -> Tensor:
    """eps = sqrt(abar) v + sqrt(1 - abar) x, Salimans and Ho 2022; v, x `[B, c, h, w]`, abar `[B]`."""
    abar = abar[:, None, None, None]
    return abar.sqrt() * v + (1 - abar).sqrt() * x


def sigma(abar: Tensor) -> Tensor:
    """sqrt((1 - abar) / abar), the noise beside a clean latent of size one; Karras et al. 2022."""
    return ((1 - abar) / abar).sqrt()


class Levels:
    """The noise levels of a model, and what is asked of it there: eps, or v where the last level is all noise.

    With zero terminal SNR (Lin et al. 2023) eps at the last level is the latent itself, whatever the text says. With
    c = sqrt(abar), s = sqrt(1 - abar), and c', s' of the level after, a step of DDIM is there as at all others

        x' = (c c' + s s') x - (s c' - c s') v

    so an error dv moves xhat' = x' / c' by (s c' - c s') / c' dv, which is dsigma deps, as deps = c dv.
    """

    ZERO = 1e-6  # the webuis write 4.9e-8 for the zero

    def __init__(self, alphas_cumprod: Tensor, velocity: bool) -> None:
        """alphas_cumprod: `[T]`. velocity: whether the network predicts v."""
        self.abar, self.velocity = alphas_cumprod.float(), velocity
        self.zero_terminal = velocity and bool(alphas_cumprod[-1] < self.ZERO)

    def said(self, out: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """What the model says `[B, c, h, w]`, by what the network gives out for latents x at `timestep` `[B]`."""
        if not self.velocity or self.zero_terminal:
            return out
        return noise_of_velocity(out, x.float(), self.abar[timestep.long()])

    def timesteps(self, steps: int, offset: float) -> list[int]:
        """Falling, evenly apart, the last at 1; moved down by the share `offset` of the distance between two.

        With zero terminal SNR the first is the last level, where alone a latent is nothing but noise.
        """
        apart = len(self.abar) // steps
        if not self.zero_terminal:
            return [max(0, apart * step + 1 - round(offset * apart)) for step in reversed(range(steps))]
        down = round(offset % 1 * apart)
        return [len(self.abar) - 1, *(apart * (step + 1) - 1 - down for step in reversed(range(steps - 1)))]

    def moves(self, t: int, after: int) -> Tensor:
        """By what an error of what is said at t moves xhat: dsigma, or the same for v."""
        if not self.zero_terminal:
            return sigma(self.abar[t]) - sigma(self.abar[after])
        return self._turned(t, after) / self.abar[after].sqrt()

    def step(self, x: Tensor, said: Tensor, t: int, after: int) -> Tensor:
        """The latents at level `after`, by DDIM with eta 0 (Song et al. 2021, eq. 12)."""
        a, b = self.abar[t], self.abar[after]
        if self.zero_terminal:
            return ((a * b).sqrt() + ((1 - a) * (1 - b)).sqrt()) * x - self._turned(t, after) * said
        clean = (x - (1 - a).sqrt() * said) / a.sqrt()
        return b.sqrt() * clean + (1 - b).sqrt() * said

    def _turned(self, t: int, after: int) -> Tensor:
        a, b = self.abar[t], self.abar[after]
        return ((1 - a) * b).sqrt() - (a * (1 - b)).sqrt()


@torch.no_grad()
def sample(
    predict_noise: PredictNoise,
    levels: Levels,
    noise: Tensor,
    guidance: Sequence[StepConditioning],
    cfg_scale: float,
    *,
    offset: float = 0.0,
    watch_positive: Callable[[int], AbstractContextManager],
    watch_negative: Callable[[int], AbstractContextManager],
) -> Iterator[int | Trajectory]:
    """`Session.sample` by DDIM: deterministic, and its steps lie evenly.

    `watch_positive` and `watch_negative` make what surrounds the U-Net's calls for the two sides of CFG at a step.
    """
    x, points, positives, negatives, moves = noise, [], [], [], []
    timesteps = levels.timesteps(len(guidance), offset)
    afters = [*timesteps[1:], max(timesteps[-1] - len(levels.abar) // len(guidance), 0)]
    # At CFG scale 1 the negative prompt has no effect, unless AND composes the prompt over it.
    guided = cfg_scale != 1 or any(given.composed() for given in guidance)
    for step, (t, after, given) in enumerate(zip(timesteps, afters, guidance, strict=True)):
        timestep = torch.full((len(x),), t, device=x.device)
        if guided:
            with watch_negative(step):
                negative = predict_noise(x, timestep, given.negative)
            negatives.append(negative)
        with watch_positive(step):
            first = predict_noise(x, timestep, given.positive[0][1])
        positive = first
        if given.composed():
            others = [(w, predict_noise(x, timestep, c)) for w, c in given.positive[1:]]
            positive = compose([(given.positive[0][0], first), *others], negative)
        points.append(x), positives.append(positive), moves.append(levels.moves(t, after))
        x = levels.step(x, negative + cfg_scale * (positive - negative) if guided else positive, t, after)
        yield step + 1
    yield Trajectory(
        x=torch.stack(points),
        timestep=torch.tensor(timesteps, device=x.device),
        dsigma=torch.stack(moves),
        positive=torch.stack(positives),
        negative=torch.stack(negatives) if guided else None,
        final=x,
    )
