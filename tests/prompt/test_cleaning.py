"""Texts as a webui's tokenizers read them: `data/cleaned_golden.json` was made by those."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_estimate.prompt.cleaning import as_open_clip
from lib_estimate.prompt.vocabulary import bundled

GOLDEN = Path(__file__).parents[1] / "data" / "cleaned_golden.json"
ROWS = json.loads(GOLDEN.read_text(encoding="utf-8"))["texts"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: ascii(row["text"]))
def test_a_text_is_read_as_in_a_webui(row) -> None:
    encode = bundled()[0].encode
    assert encode(row["text"]) == row["transformers"]
    assert encode(as_open_clip(row["text"])) == row["open_clip"]
