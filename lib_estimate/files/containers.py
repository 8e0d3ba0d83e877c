"""Torch's file containers, looked at before torch reads them: how much they would take, and whether they can be read
in a reasonable time. Code is kept out by torch's own unpickler (`weights_only`).

Every problem is a ValueError, or whatever the parsers here raise about bytes of unknown origin.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

MOST_ENTRIES = 10_000  # in a zip; an embedding has four or five
MOST_OPERATIONS = 200_000  # of a pickle; an embedding has about a hundred
MOST_NESTED = 64
LEGACY_PICKLES = 5  # magic number, version, machine, content, storages

ZIP_ENTRY = b"PK\x01\x02"
LOCAL_HEADER = struct.Struct("<26xHH")
CONTENT = "data.pkl"
NUMBER_BYTES = {
    "DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8, "IntStorage": 4,
    "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1,
}  # fmt: skip


def plain_zip(data: bytes) -> bytes:
    """A zip of torch's, made anew from what was checked in it, so that no other reading of the same bytes is trusted.

    torch never compresses: what is stored takes no more room than the file.
    """
    if data.count(ZIP_ENTRY) > MOST_ENTRIES:
        raise ValueError("too many entries")
    records: dict[str, bytes] = {}
    room, seen = len(data), set()
    for entry in zipfile.ZipFile(io.BytesIO(data)).infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.filename.lower() in seen:
            raise ValueError(f"{entry.filename} is compressed, encrypted, or there twice")
        seen.add(entry.filename.lower())  # torch looks for names in any case
        name, extra = LOCAL_HEADER.unpack_from(data, entry.header_offset)
        start = entry.header_offset + LOCAL_HEADER.size + name + extra
        records[entry.filename] = data[start : start + entry.file_size]
        room -= entry.file_size
        if len(records[entry.filename]) != entry.file_size or room < 0:
            raise ValueError(f"{entry.filename} is not as long as it claims to be")
    for name, record in records.items():
        if name.lower().endswith(CONTENT):
            _check_storages(check_pickle(io.BytesIO(record)), name[: -len(CONTENT)], records)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return made.getvalue()


def check_legacy(data: bytes) -> None:
    """The same for the container from before: pickles one after the other, and what torch itself checks."""
    stream = io.BytesIO(data)
    for _ in range(LEGACY_PICKLES):
        check_pickle(stream)


def _check_storages(claimed: list[Any], folder: str, records: dict[str, bytes]) -> None:
    """Whether each tensor's numbers are there: older versions of torch read on behind them."""
    for _, kind, key, _, count in claimed:
        if count * NUMBER_BYTES[kind.split()[-1]] != len(records[f"{folder}data/{key}"]):
            raise ValueError(f"the tensor {key} is not as long as it claims to be")


class _Value(NamedTuple):
    """What an operation of a pickle leaves: how large it is written out, how deep it nests, and what it is."""

    size: int
    depth: int
    plain: Any  # an int, a text, the name of a global, or a tuple of such; else None


def check_pickle(stream: io.BytesIO) -> list[Any]:
    """Goes through a pickle without doing what it says; returns what it takes for the tensors' storages.

    ValueError where it is long or nests deeply. Also where it is large written out: a tuple of two that are the same
    tuple of two, and so on, takes ages once it is a key of a dict.
    """
    stack: list[_Value] = []
    marks: list[int] = []  # how long the stack was at each
    memo: dict[int, _Value] = {}
    storages = []
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MOST_OPERATIONS:
            raise ValueError("too many operations")
        name = operation.name
        if name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        if name.endswith("GET"):
            stack.append(memo[argument])
            continue
        if name == "MARK":
            marks.append(len(stack))
            continue
        taken = _taken(operation.stack_before, stack, marks)
        plain = tuple(value.plain for value in taken) if name.startswith("TUPLE") else argument
        size, depth = 1 + sum(v.size for v in taken), 1 + max((v.depth for v in taken), default=0)
        if size > MOST_OPERATIONS or depth > MOST_NESTED:
            raise ValueError("too large written out, or nested too deeply")
        if name == "BINPERSID":
            storages.append(taken[0].plain)
        stack += [_Value(size, depth, plain)] * len(operation.stack_after)
    return storages


def _taken(before: Sequence[Any], stack: list[_Value], marks: list[int]) -> list[_Value]:
    """Takes off the stack what an operation needs: a number of values, or some and all down to the last mark."""
    count = len(before)
    if pickletools.markobject in before:
        count = len(stack) - marks.pop() + before.index(pickletools.markobject)
    if not 0 <= count <= len(stack):
        raise ValueError("an operation without anything to work on")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken
