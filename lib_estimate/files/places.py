"""Whether a file can be written where it is wanted: asked before minutes of work, not after them."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from lib_estimate.errors import EmbeddingFileError

ROOM = 8 << 20  # bytes that must be free: the largest embedding takes less than 1 MB, and is there twice for a moment


def hidden(folder: Path, owner: str = "") -> Path:
    """A new name for a file that is being written. The ending keeps webuis from reading it while it grows; the name is
    short, so that it fits wherever the final one does. owner: the key of the claim (`files.claim`) it belongs to."""
    return folder / f".embedding-estimate-{owner and owner + '-'}{secrets.token_hex(8)}.tmp"


def check_place(path: Path, what: str, *, in_place: bool = False) -> None:
    """Refuses a file that couldn't be written there; `what` the sentence calls it. Leaves the disk as it was.
    in_place: a file that is there is not replaced by another but written anew.

    Folders that don't exist yet are made and a small file is written, which is the one answer that holds for modes,
    read-only file systems, quotas and names that a file system doesn't take. All of it is removed again.
    """
    made: list[Path] = []
    try:
        if path.is_dir():
            raise EmbeddingFileError(f"{what} can't be written to {path}: that is a folder. Name a file.")
        if path.exists() and not path.is_file():
            return  # a device, such as /dev/stdout
        _make_folders(path.parent, made)
        _write_probe(path.parent)
        if in_place and path.exists():
            open(path, "r+b").close()
        free = _free(path.parent)
    except OSError as error:
        raise EmbeddingFileError(
            f"{what} can't be written to {path}: {_reason(path.parent, error)}. Choose another place."
        ) from error
    finally:
        for folder in reversed(made):
            with suppress(OSError):  # somebody has put something into it meanwhile
                folder.rmdir()
    if free is not None and free < ROOM:
        raise EmbeddingFileError(
            f"{what} can't be written to {path}: the disk has {free / 2**20:.1f} MB free, and {ROOM >> 20} MB are "
            "needed. Make room, or choose another place."
        )


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Makes what is missing of a folder's path, and adds it to `made`."""
    if folder.is_dir():
        return
    if folder.parent != folder:  # a drive that isn't there is its own parent
        _make_folders(folder.parent, made)
    folder.mkdir(exist_ok=True)
    made.append(folder)


def _write_probe(folder: Path) -> None:
    probe = hidden(folder)
    try:
        with open(probe, "xb") as file:
            file.write(bytes(4096))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _free(folder: Path) -> int | None:
    """Bytes that are free; None where the file system doesn't say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None


def _reason(folder: Path, error: OSError) -> str:
    """What is wrong with a folder, by the first of its path that is something else."""
    in_the_way = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), folder)
    if not in_the_way.is_dir():
        kind = "a link that leads nowhere" if in_the_way.is_symlink() and not in_the_way.exists() else "a file"
        return f"{in_the_way} is {kind}, not a folder"
    return f"{error.strerror or error}"
