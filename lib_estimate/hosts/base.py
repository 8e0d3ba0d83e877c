"""The boundary between the core and the program that holds the model.

The core asks a `Host` for a `Session` and works on the model through it alone. A session borrows the model: it freezes
the weights, and puts back whatever it changed when it ends, on success, error, interrupt and out-of-memory alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from random import Random
from typing import Protocol

import torch
from torch import Tensor

from lib_estimate.files.embedding import Vectors
from lib_estimate.request import Offload

PLACEHOLDER = "embeddingestimateplaceholder"  # the word the learnt vectors stand for
# CLIP's vocabulary begins with the single bytes, inside of words and at their end: brackets and the like, which would
# mean something in a prompt.
FIRST_WORD_ID = 2 * 256


ROUNDING = 1e-8  # of squares: what half precision may differ by where the same is computed twice


class Network(Enum):
    """What can be on the device or off it."""

    TEXT = "text encoders"
    ATTENTION = "cross-attention layers"  # of the U-Net, which has them, too
    UNET = "U-Net"
    VAE = "VAE"


@dataclass(frozen=True)
class Room:
    """What the device has room for, and what there is to put there; bytes."""

    free: int | None  # what all of it together may take, weights that are there now included; None: nobody counts
    mode: Offload  # AUTO: still to be chosen
    weights: Mapping[Network, int]
    outside: int  # of the U-Net: what is in none of its blocks
    block: int  # the largest of its blocks
    switches: Mapping[Offload, str]  # how the user sets another mode, in the host's own words
    there: int = 0  # of `free`: what weights take that are there now

    def taken(self, mode: Offload, networks: Iterable[Network]) -> int:
        """What the weights take while only these networks are needed, but for the one block that runs."""
        if mode is Offload.OFF:
            networks = (Network.TEXT, Network.UNET, Network.VAE)
        sizes = dict(self.weights)
        if Network.UNET in networks:
            if mode is Offload.BLOCKS:
                sizes[Network.UNET] = self.outside
            else:
                sizes[Network.ATTENTION] = 0
        return sum(sizes[network] for network in networks)


@dataclass(frozen=True)
class ModelInfo:
    """What the core has to know of the loaded model. Every width and shape in the core comes from here."""

    name: str
    hash: str | None  # short hash of the checkpoint, as the webui shows it
    widths: Mapping[str, int]  # text encoder's key -> width of its token embeddings
    chunk_length: int  # tokens a prompt's chunk holds, without start and end
    latent_channels: int
    latent_scale: int  # pixels per latent pixel, one way
    default_size: int  # pixels, the size the model was trained at
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Conditioning:
    """What the U-Net is told: the text encoders' hidden states `[B, T, C]`, T a multiple of a chunk's positions, and
    where the model takes one (SDXL) the pooled vector `[B, P]` of the first chunk.

    networks: the tags of the extra networks that are at work in it and in whatever is predicted under it.
    """

    hidden: Tensor
    pooled: Tensor | None = None
    networks: str = ""

    def __len__(self) -> int:
        return len(self.hidden)

    def rows(self, at: slice) -> Conditioning:
        return replace(self, hidden=self.hidden[at], pooled=None if self.pooled is None else self.pooled[at])

    def expand(self, count: int) -> Conditioning:
        """One conditioning for `count` latents; more are left as they are."""
        if len(self) != 1:
            return self
        pooled = None if self.pooled is None else self.pooled.expand(count, -1)
        return replace(self, hidden=self.hidden.expand(count, -1, -1), pooled=pooled)

    def same_as(self, other: Conditioning) -> bool:
        """Whether the same U-Net is told the same."""
        if (self.pooled is None) != (other.pooled is None) or self.networks != other.networks:
            return False
        pairs = [(self.hidden, other.hidden)]
        if self.pooled is not None:
            pairs.append((self.pooled, other.pooled))
        return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    def close_to(self, other: Conditioning) -> bool:
        """Whether the same U-Net is told the same but for rounding."""
        if self.networks != other.networks:
            return False
        if self.hidden.shape != other.hidden.shape or (self.pooled is None) != (other.pooled is None):
            return False
        pairs = [(self.hidden, other.hidden), *([] if self.pooled is None else [(self.pooled, other.pooled)])]
        return all(((a - b).square().sum() <= ROUNDING * b.square().sum()).item() for a, b in pairs)


@dataclass(frozen=True)
class PromptPart:
    """One of the prompts an `AND` composes: its weight, and its texts as (last sampling step, text), in order."""

    weight: float
    texts: tuple[tuple[int, str], ...]

    def text_at(self, step: int) -> str:
        """The text in force at sampling step `step`, counted from 0.

        A text holds up to and with the step of its number: a webui counts its steps from 0 here, too, and so changes
        one step later than the number says.
        """
        return next((text for until, text in self.texts if step <= until), self.texts[-1][1])


@dataclass(frozen=True)
class Token:
    """A piece of a prompt as the text encoder gets it; `vectors` is 0 for a word, else an embedding's."""

    text: str
    weight: float
    vectors: int


@dataclass(frozen=True)
class Words:
    """The words a model knows: each text encoder's token table `[V, width]`, wherever it lies and in its own number
    format, and how the token of a row is spelled."""

    tables: Mapping[str, Tensor]
    spelled: Callable[[int], str]


@dataclass(frozen=True)
class StepConditioning:
    """What one sampling step is given: weighted positive parts, and the negative conditioning for CFG."""

    positive: tuple[tuple[float, Conditioning], ...]
    negative: Conditioning

    def composed(self) -> bool:
        """Whether the positive side is more than one conditioning's plain answer."""
        return len(self.positive) != 1 or self.positive[0][0] != 1.0


@dataclass(frozen=True)
class Trajectory:
    """Latents on their way from noise to pictures.

    x `[S, B, c, h, w]` (S sampling steps, B seeds), timestep `[S]`, by how much each step moves sigma `[S]`, the eps
    that was predicted there for the positive parts together and for the negative prompt, each `[S, B, c, h, w]`, and
    the last latents final `[B, c, h, w]`. negative is None where it was not run, at CFG scale 1.

    Of a model with zero terminal SNR eps is v all through the core, and dsigma what takes its place
    (`denoising.Levels`).
    """

    x: Tensor
    timestep: Tensor
    dsigma: Tensor
    positive: Tensor
    negative: Tensor | None
    final: Tensor


Watch = Callable[[int, int, Tensor], None]
"""see(sampling step, number of the cross-attention layer, hidden states `[B, L, C]` that enter it)."""


@dataclass(frozen=True)
class Sensitivity:
    """What one number made of the predicted noise owes to the text, latent by latent.

    Per cross-attention layer the hidden states `[B, L, C]` that enter it and the number's gradient `[B, L, C]` in what
    leaves it, through all that follows; the gradient `[B, P]` in the pooled vector where there is one; and the eps.
    """

    hidden: list[Tensor]
    gradient: list[Tensor]
    pooled: Tensor | None
    eps: Tensor


CrossAttentionLayer = Callable[[Tensor, Tensor], Tensor]
"""layer(hidden states `[B, Q, C]`, conditioning `[B, T, D]`) -> its output `[B, Q, C]`, float32."""


def compose(parts: list[tuple[float, Tensor]], negative: Tensor) -> Tensor:
    """eps that acts under CFG like all AND parts together, eps_neg + sum_j w_j (eps_j - eps_neg); Liu et al. 2022."""
    if len(parts) == 1 and parts[0][0] == 1.0:
        return parts[0][1]
    return negative + sum(weight * (eps - negative) for weight, eps in parts)


def foreign_embedding(name: str, widths: Iterable[int], needed: Iterable[int]) -> str:
    """The note on an embedding in a prompt whose vectors don't fit the model."""
    made_for, wanted = (" and ".join(map(str, numbers)) for numbers in (widths, needed))
    return (
        f"The embedding {name} was made for another kind of model (width {made_for}; this one has {wanted}), so its "
        "name is read as plain words here."
    )


class Session(Protocol):
    """A model on loan. Everything takes and gives tensors on `info.device`."""

    info: ModelInfo
    placeholder: str  # the word that stands for the learnt vectors in a text given to `encode`
    forwards: int  # what the U-Net was run so far, in forward-equivalents: one latent 1, with gradient 3

    def read(self, prompt: str, steps: int, *, negative: bool = False) -> list[PromptPart]:
        """The prompt's AND parts and their schedules over `steps` sampling steps, as the host reads them."""

    def tags(self, prompt: str) -> tuple[str, list[str]]:
        """The prompt without the tags of extra networks, such as `<lora:name:1>`, and the tags."""

    def tokens(self, text: str) -> list[list[Token]]:
        """The tokens of each chunk, without start, end and padding."""

    def notes(self, prompt: str) -> list[str]:
        """Sentences about what in the prompt will not be as the user may think, such as a LoRA tag without effect."""

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text, without start and end."""

    def random_text(self, rng: Random, count: int) -> str:
        """Text of `count` random tokens of the vocabulary, harmless to the prompt parser."""

    def token_vectors(self, text: str) -> Vectors:
        """Rows of the token table `[n, width]` for a text read without emphasis; embeddings in it stand in full."""

    def end_vectors(self) -> Vectors:
        """The token table's row `[1, width]` of the end-of-text token, with which a webui fills up a prompt."""

    def table_norm(self) -> dict[str, float]:
        """Typical (median) length of a row of each token table."""

    def words(self) -> Words:
        """The words of the vocabulary."""

    def encode(
        self,
        texts: Sequence[str],
        vectors: Mapping[str, Tensor] | None = None,
        *,
        weighted: bool = True,
        together: bool = False,
        negative: bool = False,
        networks: str = "",
    ) -> Conditioning:
        """What the U-Net is told by texts; shorter ones are filled up with empty chunks, as a webui does.

        Gradients reach `vectors` where the placeholder stands. `weighted=False` reads the same tokens with all weights
        at one. `together`: the texts are one prompt's schedule, which "Original" emphasis normalises as one.
        `negative`: they stand in the negative prompt, which SDXL is given as zeros where it is empty. `networks`: tags
        of extra networks that are at work meanwhile, in a session that was begun with `tags`.
        """

    def predict_noise(self, x: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The U-Net's eps `[B, c, h, w]` for latents x `[B, c, h, w]` at `timestep` `[B]`; v where the model has zero
        terminal SNR, at whose last level eps says nothing of the text."""

    def sensitivity(self, x: Tensor, timestep: Tensor, conditioning: Conditioning, probe: Tensor) -> Sensitivity:
        """Of the sum of probe `[B, c, h, w]` times eps, for latents x at `timestep` `[B]` under a conditioning."""

    def sample(
        self,
        noise: Tensor,
        guidance: Sequence[StepConditioning],
        cfg_scale: float,
        *,
        offset: float = 0.0,
        watch: Watch | None = None,
        watch_negative: Watch | None = None,
    ) -> Iterator[int | Trajectory]:
        """Samples from noise `[B, c, h, w]`, one step per entry of `guidance`.

        Yields the number of each step done, and last the Trajectory. `offset` (0 to 1) moves the timesteps by that
        share of the distance between two. `watch` sees what enters each cross-attention layer while the first positive
        part is predicted, `watch_negative` while the negative prompt is.
        """

    def place(self, *networks: Network) -> None:
        """Until the next call only these are needed on the device: where it is small, the others are taken off it.

        A hint. What is used without being there comes by itself, and then stays until the next call.
        """

    def room(self) -> Room:
        """What there is room for on the device."""

    def offload(self, mode: Offload) -> None:
        """How the networks share the device until the session ends; where `room().mode` leaves that open."""

    def save_memory(self) -> bool:
        """From now on the U-Net's activations are computed again for the gradient instead of kept; until the session
        ends. False where that is so already."""

    def widen(self, network: Network) -> bool:
        """From now on a network calculates in bfloat16, which holds as large numbers as float32, instead of float16;
        until the session ends. False where it does so already, or calculates in something else than float16."""

    def cross_attention(self) -> list[CrossAttentionLayer]:
        """The U-Net's cross-attention layers, in a fixed order: its own modules, with all that changes them."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures `[B, 3, H, W]` in 0..1, float32 on the CPU, of latents `[B, c, h, w]`."""


class Host(Protocol):
    """A program with a loaded model."""

    def session(self, *, tags: bool = False) -> AbstractContextManager[Session]:
        """Borrows the model for one job.

        tags: extra networks are at work where a Conditioning names them and nowhere else. Without it, those that are
        active in the host are always at work. ModelError where the host has none.
        """

    def without(self, names: Collection[str]) -> Host:
        """The same model for prompts in which embeddings of these names are plain words, as far as the host can."""
