"""Which family of webuis this program is of: told by what it has, never by its version."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from lib_estimate.errors import ModelError

# What one of each family has, and the file that knows it. Forge also has A1111's files, some of them empty.
FAMILIES = {"backend.text_processing.classic_engine": "forge", "modules.sd_hijack_clip": "webui"}


def family() -> ModuleType:
    """`hosts.forge` or `hosts.webui`; the other is not imported."""
    for mark, name in FAMILIES.items():
        if _has(mark):
            return importlib.import_module(f"lib_estimate.hosts.{name}")
    raise ModelError(
        f"{_program()} is no webui that is known here: it must be AUTOMATIC1111's, Forge, or made from one of them. "
        "The tab works without a webui, too: embedding-estimate ui."
    )


def _has(name: str) -> bool:
    try:
        return name in sys.modules or importlib.util.find_spec(name) is not None
    except ImportError:  # nor what it would be in
        return False


def _program() -> str:
    from modules import paths_internal

    return Path(paths_internal.script_path).name
