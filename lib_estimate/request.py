"""What a user can ask for: the one place where a parameter has its default, range, choices and help.

The command line, the README's tables and the record in a saved file are made from these dataclasses. Standard library
only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from lib_estimate.choices import LOSSES, OPTIMIZERS, SCHEDULES
from lib_estimate.errors import RequestError


class Target(str, Enum):
    PROMPT = "prompt"
    NEGATIVE = "negative"
    BOTH = "both"


class Part(str, Enum):
    AUTO = "auto"
    CROSS_ATTENTION = "cross-attention"
    UNET = "unet"
    TRANSFORMER = "transformer"


class Use(str, Enum):
    ANYWHERE = "anywhere"
    WHOLE = "whole"
    SENTENCE = "sentence"


class Effort(str, Enum):
    QUICK = "quick"
    NORMAL = "normal"
    BEST = "best"


class Start(str, Enum):
    TEXT = "text"
    POOLED = "pooled"
    RANDOM = "random"


class Format(str, Enum):
    AUTO = "auto"
    PT = "pt"
    SAFETENSORS = "safetensors"


class Offload(str, Enum):
    AUTO = "auto"
    OFF = "off"
    NETWORKS = "networks"
    BLOCKS = "blocks"


class Emphasis(str, Enum):
    ORIGINAL = "Original"
    NO_NORM = "No norm"
    IGNORE = "Ignore"
    NONE = "None"


INIT_TEXT = "init_text"  # value of `vectors`: as many as the initial text has tokens
AUTO_VECTORS = "auto"  # value of `vectors`: as few as keep the error below the tolerance
AUTO = "auto"  # value of fields that depend on the part
HOLE = "{}"  # where the embedding stands in a sentence
# Fields that say what an embedding is measured by, beside the prompt.
MEASURED_BY = (
    "negative", "target", "seed", "sampling_steps", "cfg_scale", "width", "height", "images", "sentence",
)  # fmt: skip
MOST_CHARACTERS = 20_000  # of a text: some 60 chunks of words, ten times what people write


def _field(default: Any, help: str, *, low: float | None = None, high: float | None = None, choices: Any = None) -> Any:
    if choices is None and isinstance(default, Enum):
        choices = tuple(member.value for member in type(default))
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class ModelOptions:
    """Which model a host without a webui loads, and how it reads prompts. A webui has these as its own settings."""

    model: str = _field(
        "",
        "diffusers folder, or a single .safetensors / .ckpt file, of the Stable Diffusion 1, 2 or XL family. May be "
        "given again: one embedding for several fine-tunes",
    )
    device: str = _field("auto", "where to compute: auto, cpu, cuda, cuda:1, mps")
    dtype: str = _field(
        "auto",
        "number format of the model's weights; auto is float16 on a GPU and float32 on a CPU",
        choices=("auto", "float32", "float16", "bfloat16"),
    )
    offload: Offload = _field(
        Offload.AUTO,
        "what waits in main memory while the GPU doesn't need it. off: nothing. networks: text encoders, U-Net and VAE "
        "take turns on the GPU. blocks: the U-Net goes over it block by block; slow, needs least. auto: the first of "
        "these that fits into its free memory",
    )
    emphasis: Emphasis = _field(Emphasis.ORIGINAL, "how (word:1.4) is applied, as in the webui's settings")
    clip_skip: int = _field(
        1, "which layer of the text encoder is read, counted from its end (Stable Diffusion 1)", low=1
    )
    sdxl_clip_l_skip: bool = _field(False, "clip skip moves the layer of SDXL's first text encoder, too")


@dataclass(frozen=True)
class EstimateRequest:
    """One estimate: the prompt, what is fitted to it, how, and where the result goes."""

    prompt: str = _field("", "the prompt to estimate, with its emphasis: a (red:1.6) circle")
    name: str = _field("", "name of the embedding: the word to use in prompts, and the file's name")
    negative: str = _field("", "the negative prompt")
    target: Target = _field(
        Target.PROMPT,
        "which of the two becomes the embedding. both: two of them, from one recording: the second with -neg behind "
        "its name",
    )
    stages: bool = _field(
        False,
        "one embedding for each text of a prompt with AND or editing: name-1, name-2 and so on, and what to write",
    )
    beside: tuple[str, ...] = _field(
        (),
        "more prompts that the negative one will stand beside; it is learnt beside each. With fewer than four, the "
        "prompt itself among them, plain ones are added",
    )
    take_over_lora: bool = _field(
        False,
        "the LoRAs whose tags are in the prompt are at work while the target is made, and not while the word is "
        "learnt, so that it takes over what text can of them. Only in a webui",
    )
    part: Part = _field(
        Part.AUTO,
        "what has to match. auto: picks by itself what works best. cross-attention: what the text brings about in the "
        "U-Net's cross-attention layers; fast. unet: the predicted noise; slow, exact. transformer: only the text "
        "encoder's hidden states; quick, but can't carry emphasis",
    )
    effort: Effort = _field(
        Effort.NORMAL,
        "what recording and learning with part auto may cost. quick: as much as three pictures; normal: ten; best: 75",
    )
    use: Use = _field(
        Use.ANYWHERE,
        "where the word will stand. anywhere: in all kinds of prompts. whole: it is the whole prompt or the whole "
        "negative prompt. sentence: in the sentences given",
    )
    sentence: tuple[str, ...] = _field(
        (), "with --use sentence: the sentence, with {} for the word: a photo of {}, by night. May be given again"
    )
    vectors: int | str = _field(
        INIT_TEXT,
        f"number of vectors; {INIT_TEXT}: as many as the initial text has tokens, or as the embedding has that is "
        f"continued; {AUTO_VECTORS}: as few as keep the error below the tolerance",
        low=1,
        choices=(INIT_TEXT, AUTO_VECTORS),
    )
    tolerance: float = _field(0.01, f"error that vectors {AUTO_VECTORS} may leave", low=0.0, high=1.0)
    init: str = _field("", "text the vectors start from; may contain names of embeddings. Blank: the prompt itself")
    continue_from: str = _field(
        "",
        "existing embedding whose vectors the run starts from, instead of a text: its file, or its name in the folder "
        "of the embeddings. Fewer than wanted are filled up with what changes nothing, more are cut off. Its steps "
        "are counted on. Blank: none",
    )
    start: Start = _field(
        Start.TEXT,
        "how the start fills the vectors. text: token by token, cut off, or filled up: a given text with zeros, the "
        "prompt itself with what changes nothing; pooled: the text "
        "in as many pieces as there are vectors, each the mean of its tokens; random: noise as large as real tokens",
    )
    steps: int = _field(
        0, "learning steps at the most; stops earlier when the error no longer falls. 0: by part", low=0, high=100_000
    )
    learning_rate: str = _field(
        "", "learning rate, also as 0.005:100, 1e-3:1000, 1e-5 (rate until that step). Blank: by part and optimizer"
    )
    schedule: str = _field(AUTO, "how the learning rate goes on from there. auto: by part", choices=(AUTO, *SCHEDULES))
    warmup: int = _field(0, "steps over which the learning rate rises from zero", low=0, high=100_000)
    optimizer: str = _field(AUTO, "the optimizer. auto: by part", choices=(AUTO, *OPTIMIZERS))
    loss: str = _field("MSE", "how the distance to the target is measured while learning", choices=tuple(LOSSES))
    batch: int = _field(4, "noisy latents per learning step of part unet; LBFGS: 12 or more", low=1, high=256)
    queries: int = _field(6, "positions per latent that the cross-attention part looks at", low=1, high=4096)
    memory: float = _field(1.0, "GB that these and the sketch of part auto may take", low=0.01, high=64.0)
    clip_gradient: float = _field(0.0, "largest norm of the gradient; 0: no limit", low=0.0, high=1e6)
    ema: float = _field(
        0.0, "share of the old in a moving average of the vectors, such as 0.95; 0: off", low=0.0, high=0.9999
    )
    patience: int = _field(
        10, "checks without a smaller error after which learning stops; 0: never stop early", low=0, high=100_000
    )
    seed: int = _field(0, "seed of all noise; the same seed repeats a run", low=0, high=2**32 - 1)
    sampling_steps: int = _field(20, "sampling steps of the generations whose latents are learnt from", low=2, high=150)
    cfg_scale: float = _field(5.0, "CFG scale of those generations", low=1.0, high=30.0)
    width: int = _field(0, "width of those generations in pixels; 0: the model's own", low=0, high=4096)
    height: int = _field(0, "height of those generations in pixels; 0: the model's own", low=0, high=4096)
    trajectories: int = _field(
        0, "how many generations are learnt from, each from its own noise. 0: by part", low=0, high=64
    )
    images: int = _field(
        2, "pictures made of the prompt, the embedding and the prompt without weights each, to compare; 0: none",
        low=0, high=64,
    )  # fmt: skip
    out: str = _field("embeddings", "folder of the embeddings")
    subfolder: str = _field("", "folder inside it for new files. Blank: none")
    format: Format = _field(Format.AUTO, "file format. auto: pt, which every webui reads, and for SDXL safetensors")
    overwrite: bool = _field(False, "replace an embedding file of that name")
    checkpoint_every: int = _field(
        10,
        "learning steps after which the state of the run is saved beside the file, in case its process dies; it is "
        "removed when the run ends. 0: never. Not for several words at once",
        low=0, high=100_000,
    )  # fmt: skip
    resume: bool = _field(
        False, "go on where a run of this name was stopped, to the same vectors as without the stop; else begin anew"
    )

    def validate(self) -> EstimateRequest:
        """Returns itself, or raises RequestError naming the first field that is wrong and what to do."""
        for item in dataclasses.fields(self):
            _check(item, getattr(self, item.name))
            _check_text(item, getattr(self, item.name))
        for which, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            other = Target.NEGATIVE if which == "prompt" else Target.PROMPT
            if self.target is not other and not text.strip():
                raise RequestError(
                    f"The {which} is empty: there is nothing to estimate. Type the text that should become one word.",
                    which.split()[0],
                )
        self._check_negative()
        self._check_several()
        self._check_lora()
        self._check_sentences()
        self._check_start()
        if Path(self.subfolder).is_absolute() or ".." in Path(self.subfolder).parts:
            sentence = f"subfolder is {self.subfolder!r}: it must be a folder inside the embeddings folder."
            raise RequestError(sentence, "subfolder")
        return self

    @property
    def several(self) -> bool:
        """Whether it may make more than one embedding."""
        return self.stages or self.target is Target.BOTH

    def _check_negative(self) -> None:
        if self.cfg_scale == 1 and self.target is not Target.PROMPT:
            raise RequestError(
                "At CFG scale 1 the negative prompt has no effect, so nothing can be learnt of it: raise --cfg-scale, "
                "or let the prompt be the target.",
                "cfg_scale",
            )

    def _check_several(self) -> None:
        if not self.several:
            return
        what = "--stages" if self.stages else "--target both"
        if self.use is Use.SENTENCE or self.continue_from.strip() or self.init.strip():
            raise RequestError(
                f"{what} makes several embeddings, which start from their own texts and stand for whole prompts: leave "
                "--use sentence, --init and --continue out.",
                "stages" if self.stages else "target",
            )

    def _check_lora(self) -> None:
        if self.take_over_lora and (self.several or self.target is not Target.PROMPT):
            raise RequestError(
                "A LoRA is of the whole prompt, not of a part of it nor of the negative prompt, so one word for the "
                "whole prompt takes it over: leave --take-over-lora or --stages out, or let the prompt be the target.",
                "take_over_lora",
            )

    def _check_sentences(self) -> None:
        if self.use is Use.SENTENCE and not self.sentence:
            raise RequestError(
                "--use sentence needs the sentence: give it as --sentence 'a photo of {}, by night'.", "sentence"
            )
        for sentence in self.sentence:
            if sentence.count(HOLE) != 1:
                raise RequestError(
                    f"The sentence {sentence!r} must have {HOLE} once, where the word will stand.", "sentence"
                )

    def _check_start(self) -> None:
        if not self.continue_from.strip():
            return
        if self.init.strip():
            raise RequestError(
                "An initial text and an embedding to continue are two starts: leave one of them out.", "init"
            )
        if self.start is Start.RANDOM:
            raise RequestError(
                "An embedding that is continued is the start itself: choose text or pooled as the start.", "start"
            )

    @property
    def text(self) -> str:
        """The text that becomes the embedding; with both, the first of the two."""
        return self.negative if self.target is Target.NEGATIVE else self.prompt

    def record(self) -> dict[str, Any]:
        """All fields as plain values, for the saved file and for JSON."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def forwards_of_a_picture(sampling_steps: int, cfg_scale: float) -> int:
    """What a picture costs: each step a forward with the prompt, and one with the negative prompt where that counts."""
    return sampling_steps * (1 if cfg_scale == 1 else 2)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    return list(value) if isinstance(value, tuple) else value


def _check_text(item: dataclasses.Field, value: Any) -> None:
    """What every text of a request must be, before any parser or file system gets it."""
    if type(item.default) not in (str, tuple) or item.metadata["low"] is not None:
        return
    for text in value if isinstance(value, (tuple, list)) else (value,):
        if not isinstance(text, str):
            raise RequestError(f"{item.name} is {text!r}: it must be text.", item.name)
        if len(text) > MOST_CHARACTERS:
            raise RequestError(
                f"{item.name} has {len(text)} characters, and {MOST_CHARACTERS} is the most: no word can stand for so "
                "much. Leave out what matters least.",
                item.name,
            )
        if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
            raise RequestError(
                f"{item.name} has a character that is no text (a null, or half of one). Type it instead of pasting it.",
                item.name,
            )


def _check(item: dataclasses.Field, value: Any) -> None:
    """Type, range and choices of one field. Range and choices come from the field's metadata."""
    name, low, high, choices = item.name, item.metadata["low"], item.metadata["high"], item.metadata["choices"]
    if isinstance(value, Enum):
        value = value.value
    if choices is not None and value in choices:
        return
    if choices is not None and low is None:
        raise RequestError(f"{name} is {value!r}: choose one of {', '.join(map(str, choices))}.", name)
    if low is None:
        return
    whole = not isinstance(item.default, float)
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)) or value != value:
        also = "".join(f", or {choice}" for choice in choices or ())
        raise RequestError(f"{name} is {value!r}: it must be {'a whole number' if whole else 'a number'}{also}.", name)
    if value < low or (high is not None and value > high):
        wanted = f"{low} or more" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} is {value}: it must be {wanted}.", name)


def field_value(name: str, value: Any) -> Any:
    """A field as the request has it, of what JSON says; RequestError where it can't be. Ranges are the request's own
    to check."""
    item = EstimateRequest.__dataclass_fields__.get(name)
    if item is None:
        known = ", ".join(field.name for field in dataclasses.fields(EstimateRequest))
        raise RequestError(f"there is no field {name!r}. The fields are {known}.", name)
    kind = type(item.default)
    if issubclass(kind, Enum):
        if value not in item.metadata["choices"]:
            choices = ", ".join(item.metadata["choices"])
            raise RequestError(f"{name} is {value!r}: choose one of {choices}.", name)
        return kind(value)
    if kind is tuple:
        rows = [value] if isinstance(value, str) else value
        if not isinstance(rows, Sequence) or not all(isinstance(row, str) for row in rows):
            raise RequestError(f"{name} must be text, or a list of texts.", name)
        return tuple(rows)
    checked_there = item.metadata["low"] is not None
    if not checked_there and not isinstance(value, kind):
        wanted = "true or false" if kind is bool else "text"
        raise RequestError(f"{name} is {value!r}: it must be {wanted}.", name)
    return value
