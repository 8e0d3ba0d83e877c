from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.webui.real_host import RealHost

ROOT = os.environ.get("WEBUI_ROOT")


@pytest.fixture(scope="session")
def real_host(tmp_path_factory) -> Iterator[RealHost]:
    if not ROOT:
        pytest.skip("the real webui: set WEBUI_ROOT to a checkout of it")
    python = Path(os.environ.get("WEBUI_PYTHON", Path(ROOT) / "venv" / "bin" / "python"))
    with RealHost(Path(ROOT), python, tmp_path_factory.mktemp("webui")) as host:
        yield host


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROOT:
        terminalreporter.write_line("Skipped: everything in the real webui (set WEBUI_ROOT to a checkout of it).")
