"""What no input may do, whatever it is: the properties that CI tries a little, and `python -m tests.fuzz` at length.

Each is a strategy that makes cases and a function that checks one. Readers give something valid or an EstimateError of
one sentence; nothing else is raised, nothing in a file is run, and the file is left as it was.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lib_estimate.errors import EmbeddingFileError, EstimateError, PromptSyntaxError
from lib_estimate.files import lists, names, reading, writing
from lib_estimate.files.destination import free_path
from lib_estimate.files.embedding import MAX_VECTOR_BYTES, Embedding
from lib_estimate.learn.continued import Continued
from lib_estimate.prompt.attention import BREAK, parse_attention
from lib_estimate.prompt.chunks import chunks
from lib_estimate.prompt.schedule import extra_network_tags, prompt_schedule, split_and
from lib_estimate.prompt.vocabulary import bundled
from lib_estimate.report import inside
from lib_estimate.request import EstimateRequest, Target

FOLDER = Path(tempfile.mkdtemp(prefix="hostile-"))  # emptied by nobody: small files, overwritten case by case
RAN = FOLDER / "ran"  # what the code in hostile files would make


class Property(NamedTuple):
    """`check` must hold for every case that the strategy makes."""

    cases: st.SearchStrategy[Any]
    check: Callable[[Any], None]


def hold(of: Property, examples: int, seed: int | None = None, finish: Callable[[], None] | None = None) -> int:
    """Tries a property; returns the number of cases tried. Without a seed the cases are always the same."""
    tried = 0

    def one(case: Any) -> None:
        nonlocal tried
        tried += 1
        of.check(case)
        if finish is not None:
            finish()

    quiet = settings(
        max_examples=examples, deadline=None, database=None, derandomize=seed is None,
        phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    test = quiet(given(case=of.cases)(one))
    (test if seed is None else hypothesis.seed(seed)(test))()
    return tried


def one_sentence(error: EstimateError, longest: int = 1000) -> None:
    said = str(error)
    assert said
    assert "\n" not in said
    assert len(said) < longest, said


# ---- prompts --------------------------------------------------------------------------------------------------------

PIECES = [
    *"()[]:|\\<> \n,aé日", "dog", "AND", "BREAK", "1.5", "-", "1e9", "9" * 400, "nan", "inf", ":0.5]", ":1.2)", ":3]", "[a|b]",
    "<lora:x:1>", "\x00", "\u202e", "\ud83d", "<|endoftext|>", "٣",
]  # fmt: skip
PROMPTS = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=40).map("".join),
    st.lists(st.tuples(st.sampled_from(PIECES), st.integers(1, 3000)), max_size=3).map(
        lambda runs: "".join(piece * count for piece, count in runs)
    ),
    st.tuples(st.sampled_from(["(", "[", "(a", "[a|", "[a:", "([", "<a:"]), st.sampled_from([")", "]", "|b]", ":2]", "])"]),
              st.integers(1, 2000)).map(lambda case: case[0] * case[2] + "x" + case[1] * case[2]),
    st.text(max_size=200),
)  # fmt: skip
vocabulary = cache(lambda: bundled()[0])


def check_prompt(case: tuple[str, int]) -> None:
    prompt, steps = case
    text, tags = extra_network_tags(prompt)
    assert len(text) + sum(map(len, tags)) == len(prompt)
    try:
        schedule = prompt_schedule(prompt, steps)
        ends = [end for end, _ in schedule]
        assert ends == sorted(set(ends))
        assert (ends[0] >= 1, ends[-1]) == (True, steps)
        assert all(len(text) <= len(prompt) for _, text in schedule)
    except PromptSyntaxError as error:
        one_sentence(error)
    try:
        parts = split_and(prompt)
        assert parts
        assert all(abs(weight) < float("inf") and text in prompt for text, weight in parts)
    except PromptSyntaxError as error:
        one_sentence(error)
    try:
        pairs = parse_attention(prompt)
        assert pairs
        assert all(abs(weight) < float("inf") for _, weight in pairs)
        if not set(prompt) & set("()[]\\") and BREAK not in prompt:
            assert pairs == [(prompt, 1.0)]
        made, count = chunks(prompt, vocabulary())
        room = vocabulary().chunk_length
        assert all(len(chunk.tokens) == len(chunk.weights) == room + 2 for chunk in made)
        assert 0 <= count <= room * len(made)
    except PromptSyntaxError as error:
        one_sentence(error)


# ---- names, requests, lists -----------------------------------------------------------------------------------------

NAMES = st.one_of(
    st.text(max_size=150),
    st.lists(st.sampled_from([*'.,()[]#<>:"/\\|?* \t-', "a", "é", "e\u0301", "赤", "AND", "BREAK", "con", "nul", "png", ".pt",
                              ".preview", "\ud83d", "\0", "\u202e", "x" * 60]), max_size=8).map("".join),
)  # fmt: skip


def check_names(name: str) -> None:
    try:
        kept = names.check_name(name)
        assert names.check_name(kept) == kept
        assert Path(kept).name == kept
        assert names.embedding_path(FOLDER, name, "pt").parent == FOLDER
    except EmbeddingFileError as error:
        assert str(error).isprintable()
        one_sentence(error)
    usable = names.cleaned(name)
    assert usable == "" or names.check_name(usable) == usable


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), NAMES, PROMPTS,
    st.sampled_from(["", "auto", "both", "init_text", "..", "/", "~", "a/../../b", "{}", "nan", 10**400, 2**64, "x" * 30_000]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from([*EstimateRequest.__dataclass_fields__, "nothing"])


def right(name: str) -> st.SearchStrategy[Any]:
    """A value that the field could have."""
    about, default = (
        EstimateRequest.__dataclass_fields__[name].metadata,
        EstimateRequest.__dataclass_fields__[name].default,
    )
    if about["choices"]:
        return st.sampled_from(about["choices"])
    return st.just(list(default) if isinstance(default, tuple) else default)


ENTRIES = st.tuples(
    st.dictionaries(FIELDS, JSON, max_size=2),
    st.fixed_dictionaries({}, optional={name: right(name) for name in EstimateRequest.__dataclass_fields__}),
).map(lambda pair: {"name": "word", "prompt": "a (red:1.5) star", **pair[1], **pair[0]})
COMMON = EstimateRequest(out=str(FOLDER / "embeddings"))


def refused_or_valid(path: Path, common: EstimateRequest) -> None:
    try:
        found, _ = lists.read(path, common)
    except EstimateError as error:
        one_sentence(error, longest=1 << 20)  # it may quote a value
        return
    for line in found:
        try:
            free_path(replace(line.request.validate(), out=common.out))
        except EstimateError as error:
            assert str(error)
        else:
            assert json.dumps(line.request.record())


def check_requests(entries: list[dict]) -> None:
    path = FOLDER / "requests.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    refused_or_valid(path, COMMON)


LINES = st.lists(
    st.lists(st.one_of(NAMES, PROMPTS, st.sampled_from(["name", "prompt", "text", "negative_prompt", '"', "{prompt}", "#"])),
             max_size=4),
    max_size=5,
)  # fmt: skip
LIST_BYTES = st.one_of(
    st.binary(max_size=200),
    LINES.map(lambda rows: "\n".join(",".join(row) for row in rows).encode("utf-8", "replace")),
    LINES.map(lambda rows: "\n".join("\t".join(row) for row in rows).encode("utf-8", "replace")),
    LINES.map(
        lambda rows: ("name,prompt,negative_prompt\n" + "\n".join(",".join(r) for r in rows)).encode("utf-8", "replace")
    ),
    st.integers(1, 50_000).map(lambda depth: b"[" * depth + b"]" * depth),
    st.integers(100, 200_000).map(lambda size: b"name,prompt\n" + b"x" * size + b',"' + b"y" * size),
)


def check_lists(case: tuple[bytes, str, Target]) -> None:
    data, ending, target = case
    path = FOLDER / f"list{ending}"
    path.write_bytes(data)
    refused_or_valid(path, replace(COMMON, target=target))


# ---- files ----------------------------------------------------------------------------------------------------------


class Code:
    """What unpickling it would do."""

    def __reduce__(self) -> Any:
        return os.mkdir, (str(RAN),)


@cache
def sources() -> dict[str, list[bytes]]:
    """Good files of every kind, and some with code, by their ending."""
    rows, params = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), {"string_to_token": {"*": 265}}
    found: dict[str, list[bytes]] = {".pt": [], ".safetensors": [], ".png": []}
    for ending in (".pt", ".safetensors"):
        path = FOLDER / f"source{ending}"
        writing.save(Embedding("source", {"clip_l": rows}, {"step": 3, "prompt": "a"}), path, overwrite=True)
        found[ending].append(path.read_bytes())
    for content in (
        {"a": rows},
        {**params, "string_to_param": {"*": rows}, "name": "n"},
        {"a": Code()},
        {"a": rows, "b": Code()},
    ):
        for zipped in (True, False):
            made = io.BytesIO()
            torch.save(content, made, _use_new_zipfile_serialization=zipped)
            found[".pt"].append(made.getvalue())
    about = json.dumps({**params, "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}, "name": "n", "step": 1})
    found[".png"].append(png([(b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(about.encode())), (b"IEND", b"")]))
    return found


def png(parts: list[tuple[bytes, bytes]]) -> bytes:
    pieces = [
        struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(pieces)


def check_file(case: tuple[str, bytes]) -> None:
    """Reads a file, and does with it what `inspect` and `--continue` do."""
    ending, data = case
    path = FOLDER / f"file{ending}"
    path.write_bytes(data)
    try:
        embedding = reading.load(path)
    except EmbeddingFileError as error:
        one_sentence(error)
    else:
        assert embedding.name
        assert embedding.vectors
        for rows in embedding.vectors.values():
            assert (rows.dtype, rows.ndim, rows.device.type) == (torch.float32, 2, "cpu")
            assert 0 < rows.numel() <= MAX_VECTOR_BYTES // 4
            assert torch.isfinite(rows).all()
        json.dumps([look.record() for look in inside.lengths(embedding.vectors).values()])
        json.dumps(embedding.metadata, indent=1)
        json.dumps(Continued(embedding).facts())
    assert not RAN.exists(), "code in the file was run"
    assert path.read_bytes() == data, "the file was changed"


@st.composite
def damaged(draw: Any) -> tuple[str, bytes]:
    """A good file with pieces of it changed, cut out, put in twice or overwritten with numbers that lie."""
    ending = draw(st.sampled_from([".pt", ".pt", ".safetensors", ".png"]))
    data = bytearray(draw(st.sampled_from(sources()[ending])))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.sampled_from([1, 2, 4, 8, 64, 1000]))
        how = draw(st.sampled_from(["flip", "cut", "twice", "number", "end", "bytes"]))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "cut":
            del data[at : at + length]
        elif how == "twice":
            data[at:at] = data[at : at + length]
        elif how == "number":
            number = draw(st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**63, 2**64 - 1]))
            data[at : at + 8] = number.to_bytes(8, draw(st.sampled_from(["little", "big"])))
        elif how == "end":
            del data[at:]
        else:
            data[at : at + length] = draw(st.binary(max_size=16))
    return draw(st.sampled_from([ending, ending, ending, ".bin", ".webp", ".ckpt"])), bytes(data)


@st.composite
def safetensors_with_lies(draw: Any) -> tuple[str, bytes]:
    """A header of shapes, types and places that need not fit the bytes behind it."""
    number = st.one_of(st.integers(0, 64), st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 1.5, None, "8"]))
    tensor = st.fixed_dictionaries({
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "I32", "U64", "BOOL", "X", 1]),
        "shape": st.lists(number, max_size=3), "data_offsets": st.lists(number, min_size=1, max_size=3),
    })  # fmt: skip
    fitting = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "BOOL"]).map(
        lambda kind: {
            "dtype": kind,
            "shape": [2, 4],
            "data_offsets": [0, 8 * {"2": 4, "6": 2, "4": 8}.get(kind[-1], 1)],
        }
    )
    key = st.sampled_from(["emb_params", "clip_l", "clip_g", "__metadata__", "", "a\n\x1b[2J", "\ud800"])
    about = st.one_of(
        JSON,
        st.dictionaries(
            st.sampled_from(["embedding_estimate", "step", "name"]),
            st.one_of(
                st.text(max_size=20),
                JSON.map(json.dumps),
                st.integers(1, 3000).map(lambda n: '{"a":' * n + "1" + "}" * n),
            ),
            max_size=2,
        ),
    )
    entries = draw(st.lists(st.tuples(key, st.one_of(tensor, fitting, about)), max_size=3))
    header = "{" + ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in entries) + "}"
    header = draw(st.sampled_from([header, header, header, header + " " * 7, header[:-1], "[" * 5000, "null", "[]"]))
    raw = header.encode("utf-8", "surrogatepass")
    length = draw(st.sampled_from([len(raw)] * 6 + [0, 2**63, 2**64 - 1, 100_000_001, len(raw) + 1]))
    body = draw(st.sampled_from([0, 1, 8, 16, 32, 64, 100])) * draw(st.sampled_from([b"\0", b"\x3f", b"\x7f", b"\xff"]))
    return ".safetensors", length.to_bytes(8, "little") + raw + body


BOMB = zlib.compress(bytes(64 << 20), 9)


@st.composite
def cards(draw: Any) -> tuple[str, bytes]:
    """PNGs with anything in their text, and chunks that say they hold more than they do, or unpack to more."""
    tensor = st.fixed_dictionaries(
        {"TORCHTENSOR": st.one_of(JSON, st.lists(st.lists(st.floats(), max_size=3), max_size=3))}
    )
    content = draw(st.one_of(JSON, st.dictionaries(
        st.sampled_from(["string_to_param", "name", "step", "clip_l", "clip_g", "a"]),
        st.one_of(JSON, tensor, st.fixed_dictionaries({"*": tensor})), max_size=4)))  # fmt: skip
    text = draw(st.sampled_from([json.dumps(content), json.dumps(content), "[" * 3000, '{"a":' * 1200, ""])).encode()
    text = base64.b64encode(text)[: draw(st.sampled_from([None, None, None, 5, -3]))]

    chunk = st.sampled_from([
        (b"tEXt", b"sd-ti-embedding\0" + text), (b"tEXt", b"sd-ti-embedding"), (b"zTXt", b"sd-ti-embedding\0\0" + BOMB),
        (b"iTXt", b"sd-ti-embedding\0\1\0\0\0" + BOMB), (b"IDAT", BOMB), (b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 6, 0, 0, 0)),
        (b"IEND", b""),
    ])  # fmt: skip
    data = png(draw(st.lists(chunk, max_size=4)))
    return draw(st.sampled_from([".png", ".webp", ".avif"])), data[: draw(st.sampled_from([None, None, -1, -9, 12]))]


OPERATIONS = [
    bytes([code])
    for code in b"(.012NIFJKMGXUTVSLQRsudeatlo}])bcipqrghj\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x90\x91\x93\x94\x95"
]
WORDS = [
    b"torch._utils\n_rebuild_tensor_v2\n", b"collections\nOrderedDict\n", b"torch\nFloatStorage\n", b"torch\nSize\n", b"os\nmkdir\n",
    b"builtins\neval\n", b"_codecs\nencode\n", b"torch._utils\n_rebuild_parameter\n", b"torch._tensor\n_rebuild_from_type_v2\n",
    b"torch.storage\nUntypedStorage\n", b"collections\nCounter\n", b"torch._utils\n_rebuild_sparse_tensor\n", b"1\n", b"0",
]  # fmt: skip


@st.composite
def pickles(draw: Any) -> tuple[str, bytes]:
    """Operations at random, tuples of tuples without end, great claims; in either container, or rather a bomb of one."""
    kind = draw(st.sampled_from(["operations", "laughs", "deep", "claims"]))
    count = draw(st.integers(1, 3000))
    if kind == "operations":
        body = b"".join(
            draw(
                st.lists(
                    st.one_of(st.sampled_from(OPERATIONS), st.sampled_from(WORDS), st.binary(max_size=4)), max_size=30
                )
            )
        )
    elif kind == "laughs":
        body = b"}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * (count // 20) + b"K\x02s"
    elif kind == "deep":
        body = b"}K\x01" + draw(st.sampled_from([b"\x85", b"]q\x00a"])) * count + b"K\x02s"
    else:
        sizes = draw(st.lists(st.sampled_from([0, 1, 8, 2**31 - 1, 2**40, -1]), min_size=1, max_size=3))
        shape, stride = tuple(sizes), tuple(draw(st.sampled_from([0, 1, 8, -1, 2**40])) for _ in sizes)
        claim = draw(st.sampled_from([16, 0, 2**20, 2**40, -1]))
        body = (
            b"}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
            b"X\x03\x00\x00\x00cpu" + _number(claim) + b"tQK\x00" + b"(" + b"".join(map(_number, shape)) + b"t("
            + b"".join(map(_number, stride)) + b"t\x89ccollections\nOrderedDict\n)RtRs"
        )  # fmt: skip
    content = b"\x80\x02" + body + b"."
    if draw(st.booleans()):
        first = (
            pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
        )
        rows = struct.pack("<q", draw(st.sampled_from([16, 0, 2**40]))) + bytes(64)
        return ".pt", first + content + pickle.dumps(["0"], 2) + rows
    made = io.BytesIO()
    packed = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2]))
    with zipfile.ZipFile(made, "w", packed) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {
            "archive/data.pkl": content,
            "archive/version": b"3\n",
            "archive/data/0": bytes(64),
            "archive/byteorder": b"little",
        }
        for name in draw(st.permutations(list(parts))):
            archive.writestr(name, parts[name])
        for name in draw(
            st.lists(
                st.sampled_from(["archive/DATA.PKL", "archive/data.pkl", "../x", "archive/data/0", "b/data.pkl"]),
                max_size=1,
            )
        ):
            archive.writestr(name, content)
        if packed != zipfile.ZIP_STORED:
            archive.writestr("archive/data/1", bytes(1 << 20))
    return ".pt", made.getvalue()


def _number(value: int) -> bytes:
    """LONG1."""
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


PROPERTIES = {
    "prompts": Property(st.tuples(PROMPTS, st.integers(1, 150)), check_prompt),
    "names": Property(NAMES, check_names),
    "requests": Property(st.lists(ENTRIES, min_size=1, max_size=2), check_requests),
    "lists": Property(
        st.tuples(LIST_BYTES, st.sampled_from([".csv", ".txt", ".json"]), st.sampled_from(Target)), check_lists
    ),
    "damaged files": Property(damaged(), check_file),
    "pickles": Property(pickles(), check_file),
    "safetensors": Property(safetensors_with_lies(), check_file),
    "cards": Property(cards(), check_file),
    "bytes": Property(
        st.tuples(st.sampled_from([".pt", ".bin", ".safetensors", ".png"]), st.binary(max_size=300)), check_file
    ),
}
