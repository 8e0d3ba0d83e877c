"""One run at a time for each name of a folder, and what a killed run left there.

The claim is a lock of the operating system on a small hidden file. It ends with the process, however that ends, so no
refusal outlives a killed run.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lib_estimate.errors import EmbeddingFileError
from lib_estimate.files.names import files_below, key_of

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LEFTOVER = re.compile(r"\.embedding-estimate-(?:(?P<key>[0-9a-f]{16})(?:-[0-9a-f]{16}\.tmp|\.lock)|[0-9a-f]{16}\.tmp)")
OLD = 3600.0  # seconds after which a file that nobody has claimed, such as a card, is not being written any more
TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # what systems say of a lock that somebody else has


def state_path(folder: Path, name: str) -> Path:
    """Where a run keeps what it needs to go on, see `learn.resume`."""
    return Path(folder) / f".embedding-estimate-{key_of(name)}.run"


@contextmanager
def claimed(folder: Path, *names: str) -> Iterator[None]:
    """Nobody else makes embeddings of these names in the folder meanwhile. EmbeddingFileError where somebody does.

    Makes the folder, and takes it away again where nothing has come into it. Removes what killed runs have left.
    """
    folder, locks = Path(folder), []
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        for name in sorted({key_of(name): name for name in names}.values(), key=key_of):
            locks.append(_locked(folder, name))
        sweep(folder, set(map(key_of, names)))
        yield
    finally:
        for lock in locks:
            _release(*lock)
        for each in made:
            with suppress(OSError):
                each.rmdir()


def in_use(folder: Path, name: str) -> bool:
    """Whether a run that makes this name in the folder is alive."""
    return _held(_lock_path(folder, key_of(name)))


def sweep(folder: Path, mine: Collection[str] = ()) -> None:
    """Removes the hidden files of dead runs in the folder and below. Those of live ones, and what can't be removed,
    stay. mine: keys that are claimed by whoever calls, who has written nothing yet."""
    for path in files_below(folder):
        found = LEFTOVER.fullmatch(path.name)
        if found is None:
            continue
        with suppress(OSError):
            if found["key"] is None:
                if time.time() - path.stat().st_mtime > OLD:
                    path.unlink()
            elif path.suffix == ".lock":
                _release(path, _free(path))
            elif found["key"] in mine or not any(_held(_lock_path(f, found["key"])) for f in (folder, path.parent)):
                path.unlink()


# ---- locks --------------------------------------------------------------------------------------------------------


def _lock_path(folder: Path, key: str) -> Path:
    return Path(folder) / f".embedding-estimate-{key}.lock"


def _locked(folder: Path, name: str) -> tuple[Path, int | None]:
    """The lock file and its descriptor, locked; None where the folder can't have one, so that only `writing.save`
    keeps two runs from one name."""
    path = _lock_path(folder, key_of(name))
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # somebody has just removed the folder, which was empty
            continue
        except OSError:
            return path, None
        if not _lock(descriptor):
            os.close(descriptor)
            raise EmbeddingFileError(
                f'Another run is making "{name.strip()}" in {folder} right now. Wait for it, or choose another name.'
            )
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return path, descriptor
        os.close(descriptor)  # its owner removed it between our two steps
    return path, None


def _free(path: Path) -> int | None:
    """The descriptor of a lock file that nobody had locked, locked; None where somebody has."""
    descriptor = os.open(path, os.O_RDWR)
    if _lock(descriptor):
        return descriptor
    os.close(descriptor)
    return None


def _held(path: Path) -> bool:
    """Whether somebody has locked a lock file."""
    try:
        descriptor = _free(path)
    except OSError:  # there is none
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None


def _lock(descriptor: int) -> bool:
    """Locks without waiting; False where somebody else has it. Where a file system has no locks, nobody has it."""
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in TAKEN
    return True


def _release(path: Path, descriptor: int | None) -> None:
    """Removes the lock file and unlocks, in the order that leaves no moment for somebody else's."""
    if descriptor is None:
        return
    if sys.platform != "win32":  # there, nobody can remove what is open; so whoever opens it now keeps it
        with suppress(OSError):
            path.unlink()
    os.close(descriptor)
    if sys.platform == "win32":
        with suppress(OSError):
            path.unlink()
