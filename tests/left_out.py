"""Which test files can't run for want of a library: a webui has neither diffusers nor everything else of the standalone
host, and what it does have is worth testing there."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def is_there(library: str) -> bool:
    return find_spec(library) is not None


def left_out(is_there: Callable[[str], bool] = is_there) -> dict[Path, list[str]]:
    """Test files, each with the libraries that it, or something it imports, wants and that are not there."""
    there = cache(is_there)
    wanted = {path: libraries(path) for path in sorted((PROJECT / "tests").rglob("test_*.py"))}
    missing = {path: sorted(name for name in names if not there(name)) for path, names in wanted.items()}
    return {path: names for path, names in missing.items() if names}


def libraries(path: Path) -> set[str]:
    """What is imported on the way to a file's first line: its own imports, and those of each file of ours they name."""
    found, seen, ahead = set(), set(), [path]
    while ahead:
        for name in _imports(ahead.pop()):
            if (file := _file_of(name)) is None:
                if not name.startswith(("lib_estimate.", "tests.")):  # else a name inside of a file of ours
                    found.add(name.split(".")[0])
            elif file not in seen:
                seen.add(file)
                ahead.append(file)
    return found


@cache
def _imports(path: Path) -> tuple[str, ...]:
    """Only those that stand at a file's left edge: others come when they are needed, or not at all."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(names)


@cache
def _file_of(name: str) -> Path | None:
    if name.split(".")[0] not in ("lib_estimate", "tests"):
        return None
    place = PROJECT.joinpath(*name.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)
