"""The fields of a request as components of the tab, their names there, and the way back from values to a request."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

import gradio as gr

from lib_estimate.choices import OPTIMIZERS
from lib_estimate.learn.registry import missing_package
from lib_estimate.request import AUTO_VECTORS, INIT_TEXT, EstimateRequest, Part

LABELS = {
    "negative": "Negative prompt",
    "target": "Estimate",
    "name": "Name of the embedding",
    "overwrite": "Overwrite an existing embedding of this name",
    "format": "File format",
    "stages": "A word for each part of AND and each stage of editing",
    "beside": "Other prompts it will stand beside (one per line)",
    "take_over_lora": "Let the word take over the LoRA",
    "part": "Training part",
    "use": "Where will you use it?",
    "sentence": "The sentence, with {} for the word (one per line)",
    "vectors": "Vectors",
    "init": "Initial text",
    "continue_from": "Embedding to continue",
    "start": "Start of the vectors",
    "steps": "Learning steps",
    "schedule": "Scheduler",
    "batch": "Noisy latents per step",
    "queries": "Positions per latent",
    "memory": "GB for these and the sketch",
    "clip_gradient": "Largest norm of the gradient",
    "ema": "EMA",
    "cfg_scale": "CFG scale",
    "sampling_steps": "Sampling steps",
    "images": "Pictures to compare",
    "resume": "Go on",
}
WORDS = {  # value -> what the tab calls it
    "prompt": "Prompt",
    "negative": "Negative prompt",
    "both": "Both",
    "auto": "Auto",
    "cross-attention": "Cross-attention",
    "unet": "U-NET",
    "transformer": "Transformer",
    "quick": "Quick",
    "normal": "Normal",
    "best": "Best",
    "anywhere": "Anywhere in a prompt",
    "whole": "As the whole prompt",
    "sentence": "In this sentence",
}
# Their help would repeat what stands beside them.
SAID_ELSEWHERE = ("target", "name", "overwrite", "format", "part", "use", "sentence")
NUMBER = "number"  # the third way to say how many vectors
COUNTS = {AUTO_VECTORS: "Auto", INIT_TEXT: "From the initial text", NUMBER: "This many:"}
PART_HELP = {
    Part.AUTO: "picks by itself what works best",
    Part.CROSS_ATTENTION: "fast: matches what the text does inside the U-Net, without running it",
    Part.UNET: "slow and exact: matches the predicted noise",
    Part.TRANSFORMER: "quick: matches the text encoder alone, and so can't carry emphasis",
}
OPTION = re.compile(r"--([a-z][a-z-]*)(?: ([a-z_-]+)\b)?")
LEFT_OUT = {
    "out": "the program's own folder of embeddings",
    "subfolder": "a setting of the program",
    "checkpoint_every": "what the command line does unless told otherwise",
    "resume": "a button, where a stopped run is found",
}


def identifier(name: str) -> str:
    return f"embedding_estimate_{name}"


def field_of(name: str) -> dataclasses.Field:
    return EstimateRequest.__dataclass_fields__[name]


def choices_of(name: str) -> dict[str, str]:
    """value -> word in the menu."""
    return {value: _word(name, value) for value in field_of(name).metadata["choices"]}


def _word(name: str, value: str) -> str:
    if name == "optimizer" and value in OPTIMIZERS and (package := missing_package(value)):
        return f"{value} (needs the package {package})"
    return WORDS.get(value, value)


def component(name: str, value: Any) -> Any:
    """The component of a request field, with its range, choices and help."""
    item, about = field_of(name), field_of(name).metadata
    given = {"label": LABELS.get(name, name.replace("_", " ").capitalize()), "elem_id": identifier(name)}
    value = value.value if isinstance(value, Enum) else value
    if name not in SAID_ELSEWHERE:
        given["info"] = about["help"]
    if isinstance(item.default, bool):
        return gr.Checkbox(value=value, **given)
    if about["choices"] and about["low"] is None:
        words = choices_of(name)
        kind = gr.Radio if len(words) <= 4 else gr.Dropdown
        return kind(choices=list(words.values()), value=words[value], **given)
    if about["low"] is None:
        return gr.Textbox(value="\n".join(value) if isinstance(value, tuple) else value, **given)
    whole = not isinstance(item.default, float)
    if about["high"] is None or about["high"] > 200:
        return gr.Number(value=value, **({"precision": 0} if whole else {}), **given)
    return gr.Slider(about["low"], about["high"], value=value, step=1 if whole else _step(**about), **given)


def _step(low: float, high: float, **_: Any) -> float:
    """Of a slider, fine enough that it reaches the default."""
    if low >= 1:
        return 0.05
    return 0.01 if high > 1 else 0.001


def request_from(values: Mapping[str, Any]) -> EstimateRequest:
    """The request that the tab's values make; `vectors` and `vector_count` are its two ways to a number."""
    given = dict(values)
    count = int(given.pop("vector_count") or 0)  # an emptied field is refused as 0
    way = next(key for key, word in COUNTS.items() if word == given["vectors"])
    given["vectors"] = count if way == NUMBER else way
    made = {}
    for name, value in given.items():
        default = field_of(name).default
        if name != "vectors" and field_of(name).metadata["choices"]:
            value = next((key for key, word in choices_of(name).items() if word == value), value)
        made[name] = _typed(name, default, value)
    return EstimateRequest(**made)


def _typed(name: str, default: Any, value: Any) -> Any:
    if isinstance(default, tuple):
        return tuple(line.strip() for line in (value or "").splitlines() if line.strip())
    if isinstance(default, Enum):
        return type(default)(value)
    if isinstance(default, bool) or name == "vectors":
        return value
    if isinstance(default, (int, float)):
        if value is None:
            return default
        return type(default)(value) if float(value) == type(default)(value) else value
    return (value or "").strip() if name == "name" else value or ""


def in_the_tab(sentence: str) -> str:
    """A sentence that names options of the command line, with what they are called here."""

    def called(found: re.Match) -> str:
        name, value = found[1].replace("-", "_"), found[2]
        if name not in EstimateRequest.__dataclass_fields__ or (name in LEFT_OUT and name not in LABELS):
            return found[0]
        label = LABELS.get(name, name.replace("_", " ").capitalize())
        if value in (field_of(name).metadata["choices"] or ()):
            return f"“{_word(name, value)}”"
        return f"“{label}” {value}" if value else f"“{label}”"

    return OPTION.sub(called, sentence)
