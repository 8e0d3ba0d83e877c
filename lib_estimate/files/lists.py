"""Lists of requests: the webui's styles.csv, a text file of names and prompts, JSON.

A styles.csv is read as the webui reads it (`modules/styles.py` of AUTOMATIC1111 1.10.1): with or without a BOM, spaces
after commas, rows that start with # left out, `text` as an older word for `prompt`. In a style, `{prompt}` is where the
user's own prompt goes; a style without it stands behind that prompt.
"""

from __future__ import annotations

import csv
import io
import json
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lib_estimate.errors import EmbeddingFileError, RequestError
from lib_estimate.files import names
from lib_estimate.request import HOLE, EstimateRequest, Target, Use, field_value

STYLE_HOLE = "{prompt}"
NEGATIVE_ENDING = "-neg"
MAX_LIST_BYTES = 16 << 20
NO_HOLE = (
    f"{STYLE_HOLE} is left out of styles that have it: the word is what the style adds. Write it beside your prompt."
)
NO_PROMPT = (
    "--use sentence needs the prompt that the styles will stand beside: give it as --prompt. Or give the sentences "
    "themselves with --sentence."
)


@dataclass(frozen=True)
class Line:
    """One request of a list, and where in it that stands, such as `line 3`."""

    place: str
    request: EstimateRequest


@dataclass(frozen=True)
class Style:
    """A style of the webui's; what it has not is empty."""

    place: str
    name: str
    prompt: str
    negative: str


Listed = tuple[list[Line], list[str]]  # the lines, and notes on them


def read(path: Path, common: EstimateRequest) -> Listed:
    """The requests of a file, told by its ending. What it doesn't say is taken from `common`."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_LIST_BYTES:
            raise RequestError(f"{path} is no list of prompts: it is no file, or has over {MAX_LIST_BYTES >> 20} MB.")
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"{path} can't be read: {error.strerror or error}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"{path} is no UTF-8 text. Save it as UTF-8.") from error
    suffix = path.suffix.lower()
    if suffix == ".csv":
        lines, notes = of_styles(_styles(text, path), common)
    elif suffix == ".json":
        lines, notes = list(_json_requests(text, path, common)), []
    else:
        lines, notes = list(_text_lines(text, common)), []
    if not lines:
        raise RequestError(f"{path} has no prompts in it.")
    return lines, notes


# ---- styles -------------------------------------------------------------------------------------------------------


def _styles(text: str, path: Path) -> Iterator[Style]:
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        columns = rows.fieldnames or ()
        column = "prompt" if "prompt" in columns else "text"
        if "name" not in columns or column not in columns:
            raise RequestError(f"{path} is no styles.csv: its first line must be name,prompt,negative_prompt.")
        begins = rows.line_num + 1
        for row in rows:
            if not (row["name"] or "").startswith("#"):
                yield Style(f"line {begins}", row["name"] or "", row[column] or "", row.get("negative_prompt") or "")
            begins = rows.line_num + 1  # a prompt may have several lines
    except csv.Error as error:
        raise RequestError(f"{path}, line {rows.line_num}: it is no CSV ({error}).") from error


def of_styles(styles: Iterable[Style], common: EstimateRequest) -> Listed:
    """One request for each style's prompt, one for its negative prompt. Styles of neither, as dividers are, go."""
    lines: list[Line] = []
    notes: list[str] = []
    for style in styles:
        if not style.prompt.strip() and not style.negative.strip():
            continue
        name = _usable(style.name)
        if name != style.name.strip():
            notes.append(f'{style.place}: the style "{style.name}" becomes the embedding "{name}".')
        lines += [Line(style.place, request) for request in _of_style(style, name, common)]
        if STYLE_HOLE in style.prompt + style.negative and common.use is not Use.SENTENCE:
            notes.append(NO_HOLE)
    return lines, list(dict.fromkeys(notes))


def _usable(name: str) -> str:
    try:
        return names.check_name(name)
    except EmbeddingFileError:
        return names.cleaned(name)  # what can't be cleaned is refused with the other lines


def _of_style(style: Style, name: str, common: EstimateRequest) -> Iterator[EstimateRequest]:
    positive, negative = without_hole(style.prompt), without_hole(style.negative)
    if positive and negative and common.target is Target.BOTH:
        yield replace(common, name=name, prompt=positive, negative=negative)
        return
    if positive and common.target is not Target.NEGATIVE:
        given = {"target": Target.PROMPT, "prompt": positive, "negative": negative or common.negative}
        yield replace(common, name=name, **given, **_place(style.prompt, common))
    if not negative:
        return
    beside = style.prompt.replace(STYLE_HOLE, common.prompt).strip() if common.prompt.strip() else positive
    alone = {"use": Use.WHOLE} if common.use is Use.SENTENCE and not common.sentence else {}
    ending = NEGATIVE_ENDING if positive else ""
    yield replace(
        common, name=name + ending, target=Target.NEGATIVE, prompt=beside or common.prompt, negative=negative,
        **alone,
    )  # fmt: skip


def without_hole(text: str) -> str:
    """A style's text with nothing in the place of the user's prompt, and no comma too many."""
    if STYLE_HOLE not in text:
        return text.strip()
    text = text.replace(STYLE_HOLE, "")
    text = re.sub(r"\([\s,]*(:\s*[\d.]+\s*)?\)", "", text)  # emphasis of nothing
    text = re.sub(r",(\s*,)+", ",", re.sub(r"[ \t]+", " ", text))
    return text.strip(" ,\n\t").removeprefix(". ")


def _place(text: str, common: EstimateRequest) -> dict[str, Any]:
    """With --use sentence: where a style's word stands beside the user's prompt, which is where its text stood."""
    if common.use is not Use.SENTENCE or common.sentence:
        return {}
    if not common.prompt.strip():
        raise RequestError(NO_PROMPT)
    before = text.partition(STYLE_HOLE)[0].strip(" ,") if STYLE_HOLE in text else ""
    sentence = f"{HOLE}, {common.prompt}" if before else f"{common.prompt}, {HOLE}"
    return {"sentence": (sentence,)}


# ---- text and JSON ------------------------------------------------------------------------------------------------


def _text_lines(text: str, common: EstimateRequest) -> Iterator[Line]:
    for number, row in enumerate(text.splitlines(), 1):
        if not row.strip() or row.lstrip().startswith("#"):
            continue
        name, tab, prompt = row.partition("\t")
        if not tab:
            raise RequestError(f"line {number} has no tab: write the name, a tab, and the prompt.")
        side = "negative" if common.target is Target.NEGATIVE else "prompt"
        yield Line(f"line {number}", replace(common, name=name.strip(), **{side: prompt.strip()}))


def _json_requests(text: str, path: Path, common: EstimateRequest) -> Iterator[Line]:
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is no JSON: {error}.") from error
    if not isinstance(entries, list):
        raise RequestError(f"{path} must be a list of requests: [{{...}}, {{...}}].")
    for number, entry in enumerate(entries, 1):
        place = f"entry {number}"
        if not isinstance(entry, dict):
            raise RequestError(f'{place} must have the fields of a request: {{"name": ..., "prompt": ...}}.')
        try:
            fields = {name: field_value(name, value) for name, value in entry.items()}
        except RequestError as error:
            raise RequestError(f"{place}: {error}", error.field) from error
        yield Line(place, replace(common, **fields))
