"""The pictures of a report as the tab and a program's cards show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lib_estimate.job import Outcome
from lib_estimate.report.fidelity import Fidelity
from lib_estimate.report.in_words import REFERENCES, result_sentence
from lib_estimate.request import EstimateRequest


def gallery(fidelity: Fidelity, name: str) -> list[tuple[Image.Image, str]]:
    """Pictures row by row, each with its title; of several checkpoints one after the other. name: of what was made."""
    several = fidelity.checkpoints
    if not several:
        return _rows(fidelity, {"prompt": "prompt", "embedding": name, **REFERENCES})
    titles = {"embedding": name, **REFERENCES}
    return [shown for one in several for shown in _rows(one.fidelity, {"prompt": f"prompt, {one.name}", **titles})]


def _rows(fidelity: Fidelity, titles: Mapping[str, str]) -> list[tuple[Image.Image, str]]:
    columns = {
        titles[name]: [Image.fromarray((p.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for p in batch]
        for name, batch in fidelity.pictures.items()
    }
    rows = max(map(len, columns.values()), default=0)
    return [(images[row], title) for row in range(rows) for title, images in columns.items()]


def cards(outcome: Outcome, request: EstimateRequest) -> list[tuple[Path, Image.Image | None, str]]:
    """What a program shows of new files: where each is, its own picture, a description."""
    own = next((image for image, title in gallery(outcome.fidelity, outcome.title) if title == outcome.title), None)
    texts = [word["text"] for word in outcome.record.get("words", [])] or [request.text]
    said = result_sentence(outcome.fidelity, outcome.title)
    paths = (outcome.path, *outcome.others)
    return [(path, own, f"{said}\n\n{text}") for path, text in zip(paths, texts, strict=True)]
