"""One run at a time on a name, whatever became of the run before; and what killed runs leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lib_estimate import words
from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files.claim import OLD, claimed, in_use, sweep
from lib_estimate.files.places import hidden
from lib_estimate.request import Target

HOLDER = """
import sys
from pathlib import Path
from lib_estimate.files.claim import claimed
from lib_estimate.files.names import key_of
from lib_estimate.files.places import hidden
with claimed(Path(sys.argv[1]), sys.argv[2]):
    hidden(Path(sys.argv[1]), key_of(sys.argv[2])).write_bytes(b"half")
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextmanager
def other_process(folder: Path, name: str):
    """A process that has claimed a name and is just writing its file."""
    given = [sys.executable, "-c", HOLDER, str(folder), name]
    with subprocess.Popen(given, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        try:
            yield process
        finally:
            process.kill()


def refused(folder: Path, name: str) -> bool:
    try:
        with claimed(folder, name):
            return False
    except EmbeddingFileError as error:
        return "right now" in str(error)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_two_runs_of_one_process_or_of_two(tmp_path) -> None:
    with claimed(tmp_path, "word"):
        assert refused(tmp_path, "WORD ")
        assert not refused(tmp_path, "other")
        assert in_use(tmp_path, "word")
    assert files(tmp_path) == []
    assert not in_use(tmp_path, "word")
    with other_process(tmp_path, "word"):
        assert refused(tmp_path, "word")
        assert not refused(tmp_path, "other")


def test_a_killed_run_refuses_nobody_and_what_it_left_goes(tmp_path) -> None:
    with other_process(tmp_path, "word") as process, other_process(tmp_path, "live"):
        kept = {path for path in tmp_path.iterdir() if path.suffix in (".tmp", ".lock")}
        assert len(kept) == 4
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(files(tmp_path)) == 4
        with claimed(tmp_path, "third"):
            assert len(files(tmp_path)) == 3  # of the run that lives, and our own
    assert not refused(tmp_path, "word")


def test_what_the_same_name_left_goes_too(tmp_path) -> None:
    with other_process(tmp_path, "word") as process:
        process.kill()
        process.wait()
        (tmp_path / "sub").mkdir()
        (leftover,) = tmp_path.glob("*.tmp")
        leftover.rename(tmp_path / "sub" / leftover.name)
        with claimed(tmp_path, "word"):
            assert files(tmp_path / "sub") == []


def test_what_nobody_claims_goes_when_it_is_old(tmp_path) -> None:
    """Cards are written when the run has ended; and files of others stay, whatever their age."""
    card, old, foreign = hidden(tmp_path), hidden(tmp_path), tmp_path / ".embedding-estimate-notes.tmp"
    for path in (card, old, foreign):
        path.write_bytes(b"")
    before = old.stat().st_mtime - OLD - 60
    os.utime(old, (before, before))
    os.utime(foreign, (before, before))
    sweep(tmp_path)
    assert set(tmp_path.iterdir()) == {card, foreign}


def test_a_folder_that_was_made_for_nothing_is_taken_away(tmp_path) -> None:
    with claimed(tmp_path / "new" / "newer", "word"):
        assert files(tmp_path / "new" / "newer")
    assert files(tmp_path) == []
    with claimed(tmp_path / "new", "word"):
        (tmp_path / "new" / "word.pt").write_bytes(b"")
    assert files(tmp_path / "new") == ["word.pt"]


def test_where_there_are_no_locks_a_run_goes_on(tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with claimed(tmp_path / "file", "word"):
        pass


def test_several_names_are_claimed_together_or_not_at_all(tmp_path) -> None:
    with claimed(tmp_path, "b"):
        with pytest.raises(EmbeddingFileError, match='"b"'), claimed(tmp_path, "a", "b", "c"):
            raise AssertionError
        assert not refused(tmp_path, "a")
        assert not refused(tmp_path, "c")


def test_a_second_run_is_refused_before_it_needs_a_model(short, tmp_path) -> None:
    several = replace(short, target=Target.BOTH, negative="(blurry:1.4)")
    with claimed(tmp_path, short.name):
        for request in (short, several, replace(short, stages=True, name="Short")):
            with claimed(tmp_path, "Short-1"), pytest.raises(EmbeddingFileError, match="right now"):
                next(words.estimate(request, host=None))
