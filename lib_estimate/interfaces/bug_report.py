"""What to paste into a bug report after an unexpected error: versions, host, card, settings, trace. No prompt, no name
and no path of the user's home."""

from __future__ import annotations

import platform
import re
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lib_estimate.request import EstimateRequest

PACKAGES = (
    "embedding-estimate", "torch", "gradio", "fastapi", "pydantic", "transformers", "diffusers", "safetensors", "numpy",
)  # fmt: skip
# Fields of a request that say what the user is at, and where his files are.
PRIVATE = ("prompt", "negative", "beside", "sentence", "init", "name", "continue_from", "out", "subfolder")
PROJECT = Path(__file__).parents[2]
SHORTEST = 3  # characters of a private text that is looked for: a shorter one stands in many places by chance


def bug_report(error: BaseException, request: EstimateRequest | None, host: Callable[[], Mapping[str, str]]) -> str:
    """The text. host: facts of the program, which may fail as well."""
    settings = {} if request is None else request.record()
    facts = {**_versions(), "device": _device()}
    try:
        facts |= host()
    except Exception as failed:  # noqa: BLE001 (a report with less in it is still one)
        facts["host"] = f"not known ({type(failed).__name__})"
    changed = {key: value for key, value in settings.items() if key not in PRIVATE and value != _default(key)}
    given = [key for key in PRIVATE if settings.get(key) and settings[key] != _default(key)]
    lines = [
        *(f"{key}: {value}" for key, value in facts.items()),
        f"settings other than the defaults: {changed or 'none'}",
        f"also given, and left out here: {', '.join(given) or 'nothing'}",
        "",
        *_trace(error),
    ]
    return _without("\n".join(lines), settings)


def _default(name: str) -> Any:
    return EstimateRequest().record()[name]


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    try:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
        return f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GB free now"
    except RuntimeError as error:  # as after an error of the card
        return f"a card that does not answer ({type(error).__name__})"


def _trace(error: BaseException) -> list[str]:
    """The trace, and those of what it came from, with files by the end of their path."""
    found: list[str] = []
    told: BaseException | None = error
    while told is not None:
        rows = traceback.extract_tb(told.__traceback__)
        frames = [f"  {_shown(row.filename)}:{row.lineno} in {row.name}: {row.line}" for row in rows]
        found = [f"{type(told).__name__}: {told}", *frames, *(["from:"] if found else []), *found]
        told = told.__cause__ or (None if told.__suppress_context__ else told.__context__)
    return found


def _shown(file: str) -> str:
    path = Path(file)
    if path.is_relative_to(PROJECT):
        return path.relative_to(PROJECT).as_posix()
    return "/".join(path.parts[-3:])


def _without(text: str, settings: Mapping[str, Any]) -> str:
    """The text without what is private, wherever an error quotes it."""
    private = {"~": [str(Path.home()), Path.home().as_posix()]}
    for key in PRIVATE:
        value = settings.get(key) or ()
        if value == _default(key):
            continue
        private[f"<{key}>"] = [value] if isinstance(value, str) else list(value)
    for stands, values in private.items():
        for value in sorted(values, key=len, reverse=True):
            if len(value) < SHORTEST:
                continue
            for spelled in (value, repr(value)[1:-1]):
                text = re.sub(rf"(?<!\w){re.escape(spelled)}(?!\w)", lambda _, stands=stands: stands, text)
    return text
