from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.webui.real_host import SHAPES_SD, RealHost

ROOT = os.environ.get("WEBUI_ROOT")
FLAGS = shlex.split(os.environ.get("WEBUI_FLAGS", ""))

OTHERS = (
    sorted(Path(os.environ["WEBUI_CHECKPOINTS"]).glob("*.safetensors")) if "WEBUI_CHECKPOINTS" in os.environ else []
)


@pytest.fixture(scope="session")
def real_host(tmp_path_factory) -> Iterator[RealHost]:
    """With the small trained model."""
    with started(SHAPES_SD, tmp_path_factory) as host:
        yield host


@pytest.fixture(scope="session", params=[SHAPES_SD, *OTHERS], ids=lambda path: path.stem)
def each_real_host(request, tmp_path_factory) -> Iterator[RealHost]:
    """With the small trained model, and with each checkpoint of the folder WEBUI_CHECKPOINTS."""
    if request.param == SHAPES_SD:
        yield request.getfixturevalue("real_host")
        return
    with started(request.param, tmp_path_factory) as host:
        yield host


def started(checkpoint: Path, tmp_path_factory) -> RealHost:
    if not ROOT:
        pytest.skip("the real webui: set WEBUI_ROOT to a checkout of it")
    python = Path(os.environ.get("WEBUI_PYTHON", Path(ROOT) / "venv" / "bin" / "python"))
    launch = shlex.split(os.environ.get("WEBUI_LAUNCH", "launch.py"))
    return RealHost(Path(ROOT), python, tmp_path_factory.mktemp("webui"), checkpoint, launch, FLAGS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROOT:
        terminalreporter.write_line("Skipped: everything in the real webui (set WEBUI_ROOT to a checkout of it).")
