"""What clients of the HTTP API send: JSON becomes a request, or an error that names the field."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lib_estimate import job
from lib_estimate.choices import OPTIMIZERS
from lib_estimate.errors import EmbeddingFileError, EstimateError, RequestError
from lib_estimate.files import names
from lib_estimate.files.destination import first_name
from lib_estimate.files.names import EMBEDDING_SUFFIXES
from lib_estimate.learn.registry import missing_package, parse_learning_rate
from lib_estimate.request import MEASURED_BY, EstimateRequest, field_value

NOT_ASKED = "out"  # the program's own folder of embeddings
OPTION = re.compile(r"--([a-z][a-z-]*)")
SURROGATE = re.compile("[\ud800-\udfff]")
CALLED = {"continue": "continue_from", "lr": "learning_rate"}
MOST_STEPS = EstimateRequest.__dataclass_fields__["sampling_steps"].metadata["high"]
ESTIMATE = tuple(item.name for item in dataclasses.fields(EstimateRequest) if item.name != NOT_ASKED)
MEASURE = ("name", "prompt", *MEASURED_BY)
PARSE = {
    "prompt": {"type": "string", "description": "the prompt to read"},
    "steps": {"type": "integer", "default": 20, "minimum": 1, "maximum": MOST_STEPS, "description": "sampling steps"},
    "negative": {"type": "boolean", "default": False, "description": "whether it is a negative prompt"},
}


def read_json(raw: bytes) -> dict[str, Any]:
    """The fields of a body; RequestError where it is none."""
    try:
        given = json.loads(raw)
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, a number of too many digits, nested too deeply
        raise RequestError(f"The request is no JSON that can be read: {error}.") from error
    if not isinstance(given, dict):
        raise RequestError('The request must be an object: {"name": ..., "prompt": ...}.')
    for name, value in given.items():
        pieces = value if isinstance(value, list) else [value]
        if any(isinstance(piece, (list, dict)) for piece in pieces):
            raise RequestError(f"{name!r} is nested: a field is text, a number, true, false, or a list of texts.", name)
        if any(isinstance(piece, str) and SURROGATE.search(piece) for piece in (name, *pieces)):
            raise RequestError(f"{name!r} has half of a surrogate pair in it, which is no character.", name)
    return given


def estimate_request(given: Mapping[str, Any], folder: Path, start: Mapping[str, Any]) -> EstimateRequest:
    """A request that can begin. folder: of the embeddings, which nothing in it can leave. start: what the program
    begins with in place of the request's own defaults."""
    if NOT_ASKED in given:
        raise RequestError(
            "out can't be given here: files go into the program's own folder of embeddings. subfolder is a folder "
            "inside of it.", NOT_ASKED,
        )  # fmt: skip
    request = _request({**start, **given}, ESTIMATE, folder).validate()
    _check_rate(request)
    if request.continue_from.strip():
        found = embedding_inside(request.continue_from.strip(), folder, "continue_from")
        # As a path it would be looked for where the program was started, too.
        if Path(request.continue_from).suffix.lower() in EMBEDDING_SUFFIXES:
            request = replace(request, continue_from=str(found))
    try:
        names.check_name(request.name)
    except EmbeddingFileError as error:
        raise RequestError(str(error), "name") from error
    first = replace(request, name=first_name(request))
    if not _is_inside(folder / request.subfolder, folder):
        raise RequestError("subfolder leads out of the embeddings folder.", "subfolder")
    taken = names.find_existing(folder, first.name)
    if taken is not None and not _is_inside(taken, folder):
        raise RequestError(f"{first.name} is a link out of the embeddings folder: choose another name.", "name")
    try:
        job.check_destination(first)
    except EstimateError as error:
        raise RequestError(str(error), "name" if taken is not None else getattr(error, "field", "")) from error
    return request


def measure_request(given: Mapping[str, Any], folder: Path) -> tuple[Path, EstimateRequest]:
    """The file to measure, and by what."""
    request = _request(given, MEASURE, folder)
    if not request.name.strip():
        raise RequestError("name must be given: of the embedding to measure, in the embeddings folder.", "name")
    return embedding_inside(request.name.strip(), folder, "name"), request.validate()


def parse_request(given: Mapping[str, Any]) -> tuple[str, int, bool]:
    """The prompt to read, the sampling steps, whether it is a negative prompt."""
    _check_names(given, PARSE)
    prompt, steps, negative = (given.get(name, about.get("default")) for name, about in PARSE.items())
    if not isinstance(prompt, str):
        raise RequestError("prompt must be given, as text.", "prompt")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MOST_STEPS:
        raise RequestError(f"steps is {steps!r}: it must be a whole number between 1 and {MOST_STEPS}.", "steps")
    if not isinstance(negative, bool):
        raise RequestError(f"negative is {negative!r}: it must be true or false.", "negative")
    return prompt, steps, negative


def embedding_inside(given: str, folder: Path, field: str) -> Path:
    """The file that is meant by a name, or by a path inside of the folder; RequestError for whatever is not in it, also
    by a link."""
    if given.startswith("~") or PureWindowsPath(given).anchor or PurePosixPath(given).is_absolute():
        inside = False
    else:
        inside = ".." not in PureWindowsPath(given).parts
    if not inside:
        raise RequestError(
            f"{field} is {given!r}: it must be the name of an embedding, or a path inside of the embeddings folder.",
            field,
        )
    path = folder / given
    named = path.suffix.lower() in EMBEDDING_SUFFIXES and path.is_file()
    found = path if named else names.find_readable(folder, given)
    if found is None or not _is_inside(found, folder):
        raise RequestError(f"{field} is {given!r}: there is no such embedding in the embeddings folder.", field)
    return found.absolute()


def _is_inside(path: Path, folder: Path) -> bool:
    """With links followed."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # no path, or a link to itself
        return False


def _check_rate(request: EstimateRequest) -> None:
    """What else would be noticed only after the target is recorded."""
    try:
        if request.learning_rate:
            parse_learning_rate(request.learning_rate, max(request.steps, 1))
    except EstimateError as error:
        raise RequestError(str(error), "learning_rate") from error
    package = missing_package(request.optimizer) if request.optimizer in OPTIMIZERS else None
    if package:
        raise RequestError(f"optimizer {request.optimizer!r} needs the package {package}.", "optimizer")


def _request(given: Mapping[str, Any], known: Collection[str], folder: Path) -> EstimateRequest:
    _check_names(given, known)
    return EstimateRequest(**{name: field_value(name, value) for name, value in given.items()}, out=str(folder))


def _check_names(given: Mapping[str, Any], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise RequestError(f"There is no field {name!r}. The fields are {', '.join(known)}.", name)


def in_the_api(sentence: str) -> str:
    """A sentence that names options of the command line, with what they are called here."""

    def called(found: re.Match) -> str:
        name = CALLED.get(found[1], found[1].replace("-", "_"))
        return name if name in ESTIMATE else found[0]

    return OPTION.sub(called, sentence)


# ---- what there is to ask, for OpenAPI ----------------------------------------------------------------------------


def estimate_schema(start: Mapping[str, Any]) -> dict[str, Any]:
    return _schema({name: _property(name, start) for name in ESTIMATE}, ("name",))


def measure_schema() -> dict[str, Any]:
    return _schema({name: _property(name, {}) for name in MEASURE}, ("name", "prompt"))


def parse_schema() -> dict[str, Any]:
    return _schema(PARSE, ("prompt",))


def _schema(properties: dict[str, Any], required: Collection[str]) -> dict[str, Any]:
    return {
        "type": "object", "properties": properties, "required": list(required), "additionalProperties": False,
    }  # fmt: skip


def _property(name: str, start: Mapping[str, Any]) -> dict[str, Any]:
    """Type, default, range, choices and help of a field."""
    item = EstimateRequest.__dataclass_fields__[name]
    default, about = start.get(name, item.default), item.metadata
    default = default.value if isinstance(default, Enum) else default
    said = {"description": in_the_api(about["help"])}
    if isinstance(item.default, tuple):
        return {"type": "array", "items": {"type": "string"}, "default": list(default), **said}
    numbers = {"minimum": about["low"], "maximum": about["high"]}
    numbers = {key: value for key, value in numbers.items() if value is not None}
    if isinstance(item.default, bool):
        kind: dict[str, Any] = {"type": "boolean"}
    elif about["choices"] and numbers:
        kind = {"anyOf": [{"type": "integer", **numbers}, {"type": "string", "enum": list(about["choices"])}]}
    elif about["choices"]:
        kind = {"type": "string", "enum": list(about["choices"])}
    elif numbers:
        kind = {"type": "number" if isinstance(item.default, float) else "integer", **numbers}
    else:
        kind = {"type": "string"}
    return {**kind, "default": default, **said}
