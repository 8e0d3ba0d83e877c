"""A text as a webui's tokenizers get it: signs that only look different become the common ones.

Leans on `ftfy.fix_text`, as the webuis do: ligatures, full-width letters, curly quotes and what was decoded wrongly.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable

import ftfy

Clean = Callable[[str], str]
SPACE = re.compile(r"\s+")


def as_clip(text: str) -> str:
    """As transformers' tokenizer of CLIP does it where ftfy is installed: Stable Diffusion 1, SDXL's first encoder.

    ftfy itself reads &quot; and the like, but for texts with < in them.
    """
    # Lower case here: the tokenizers that are written in Rust have no final sigma.
    return SPACE.sub(" ", ftfy.fix_text(text)).strip().lower()


def as_open_clip(text: str) -> str:
    """As OpenCLIP's: Stable Diffusion 2, SDXL's second encoder."""
    return SPACE.sub(" ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip().lower()
