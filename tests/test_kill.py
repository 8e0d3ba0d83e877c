"""A few runs that are killed, as `python -m tests.kill` does fifty times."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="killed runs are forked ones")
def test_killed_runs_leave_whole_files_and_nothing_for_good() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.kill", "--runs", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "killed: " in done.stdout
    assert "gone on with to the same vectors: " in done.stdout
