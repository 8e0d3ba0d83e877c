"""Files made to hurt: each would have run code, taken the memory or time of the machine, or raised something else."""

from __future__ import annotations

import base64
import io
import json
import os
import struct
import zipfile
from dataclasses import replace

import pytest
import torch

from lib_estimate.errors import EmbeddingFileError, RequestError
from lib_estimate.files import containers, lists, reading
from lib_estimate.files.names import cleaned
from lib_estimate.learn.continued import Continued
from lib_estimate.request import EstimateRequest, Target
from tests.hostile import COMMON, PROPERTIES, hold, png

REQUESTS = EstimateRequest(prompt="a", name="b")


@pytest.mark.parametrize("name", [name for name in PROPERTIES if name not in ("prompts", "names")])
def test_the_properties_hold(name) -> None:
    assert hold(PROPERTIES[name], 60) >= 30


def refused(tmp_path, name: str, data: bytes) -> str:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(EmbeddingFileError) as caught:
        reading.load(path)
    return str(caught.value)


def read(tmp_path, name: str, data: bytes):
    path = tmp_path / name
    path.write_bytes(data)
    return reading.load(path)


def torch_zip(content: dict, how: int = zipfile.ZIP_STORED, **changed: bytes) -> bytes:
    """A torch file, its entries put into a zip anew: compressed, or with other content by the end of their name."""
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(made, "w", how) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, changed.get(entry.filename.split("/")[-1].replace(".", "_"), old.read(entry)))
    return made.getvalue()


def safetensors(header: object, body: int = 32) -> bytes:
    raw = json.dumps(header).encode() if not isinstance(header, str) else header.encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(body)


FITTING = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}


def test_a_zip_that_unpacks_to_more_than_it_is_is_not_unpacked(tmp_path) -> None:
    data = torch_zip({"a": torch.zeros(4096, 4096)}, zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 20
    assert "cut off or damaged" in refused(tmp_path, "bomb.pt", data)


def test_the_same_zip_unpacked_is_read(tmp_path) -> None:
    assert read(tmp_path, "plain.pt", torch_zip({"a": torch.ones(2, 4)})).vectors["clip_l"].tolist() == [[1.0] * 4] * 2


@pytest.mark.parametrize("packed", ["zip", "legacy"])
@pytest.mark.parametrize(
    "body",
    [
        b"}K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"K\x02s",  # a tuple of two of a tuple of two ... as a key
        b"}K\x01" + b"\x85" * 150_000 + b"K\x02s",
        b"}" + b"K\x01K\x02s" * 100_000,
    ],
    ids=["laughs", "deep", "long"],
)
def test_a_pickle_that_would_take_ages_is_not_begun(tmp_path, body, packed) -> None:
    content = b"\x80\x02" + body + b"."
    if packed == "zip":
        data = torch_zip({"a": torch.ones(1, 4)}, data_pkl=content)
    else:
        saved = io.BytesIO()
        torch.save({"a": 1}, saved, _use_new_zipfile_serialization=False)
        start = saved.getvalue().index(b"\x80\x02}q\x00X\x01\x00\x00\x00a")
        data = saved.getvalue()[:start] + content + saved.getvalue()[start:]
    assert "cut off or damaged" in refused(tmp_path, "slow.pt", data)


def test_a_tensor_that_claims_more_numbers_than_there_are_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="not as long"):
        containers.plain_zip(torch_zip({"a": torch.ones(2, 4)}, **{"0": bytes(16)}))
    assert refused(tmp_path, "lie.pt", torch_zip({"a": torch.ones(2, 4)}, **{"0": bytes(16)}))


def test_a_tensor_repeated_by_its_stride_takes_no_room(tmp_path) -> None:
    saved = io.BytesIO()
    torch.save({"a": torch.zeros(1).expand(5000, 5000)}, saved)
    assert "[5000, 5000]" in refused(tmp_path, "stride.pt", saved.getvalue())


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_numbers_of_a_new_kind_are_read_or_refused(tmp_path, dtype) -> None:
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2, 4).to(dtype)}, saved)
    assert read(tmp_path, "f8.pt", saved.getvalue()).vectors["clip_l"].sum() == 8


def test_a_key_that_cannot_be_shown(tmp_path) -> None:
    saved = io.BytesIO()
    torch.save({10**500: 1, "b\x1b[2J": 2}, saved)
    assert "int" in refused(tmp_path, "key.pt", saved.getvalue())
    torch.save({10**500: torch.ones(1, 4)}, saved := io.BytesIO())
    assert read(tmp_path, "one.pt", saved.getvalue()).metadata == {"token": "int"}


def test_a_step_of_hundreds_of_digits_is_left_out(tmp_path) -> None:
    saved = io.BytesIO()
    torch.save({"string_to_param": {"*": torch.ones(1, 4)}, "step": 10**500, "name": "n"}, saved)
    embedding = read(tmp_path, "step.pt", saved.getvalue())
    assert embedding.metadata == {"name": "n"}
    assert Continued(embedding).steps == 0


@pytest.mark.parametrize("about", [None, {}])
def test_a_header_without_metadata(tmp_path, about) -> None:
    assert read(tmp_path, "a.safetensors", safetensors({"__metadata__": about, "e": FITTING})).metadata == {}


def test_a_record_that_could_be_read_but_not_written_is_left(tmp_path) -> None:
    about = {"embedding_estimate": '{"a": ' + "9" * 5000 + "}"}
    assert read(tmp_path, "a.safetensors", safetensors({"__metadata__": about, "e": FITTING})).metadata == about


@pytest.mark.parametrize(
    "header",
    [
        {"e": {**FITTING, "data_offsets": [0, 2**63]}},
        {"e": {**FITTING, "shape": [2**32, 2**32]}},
        {"e": {**FITTING, "data_offsets": [32, 0]}},
        {"e": {**FITTING, "dtype": "F4"}},
        '{"e":' * 5000,
    ],
)
def test_a_header_that_lies(tmp_path, header) -> None:
    assert "cut off or damaged" in refused(tmp_path, "a.safetensors", safetensors(header))


def test_a_header_longer_than_the_file(tmp_path) -> None:
    assert refused(tmp_path, "a.safetensors", (2**64 - 1).to_bytes(8, "little") + b"{}")


def test_a_card_with_a_name_that_no_terminal_should_print(tmp_path) -> None:
    text = json.dumps({"name": "\x1b[2J", "a": 1, "string_to_param": {"*": {"TORCHTENSOR": [[1.0, 2.0]]}}})
    card = png([(b"tEXt", b"sd-ti-embedding\0" + base64.b64encode(text.encode()))])
    assert read(tmp_path, "card.png", card).name == "card"


def test_a_card_with_a_text_of_many_megabytes_is_not_unpacked(tmp_path) -> None:
    text = base64.b64encode(b"[" + b"[]," * (5 << 20) + b"[]]")
    assert "cut off or damaged" in refused(tmp_path, "card.png", png([(b"tEXt", b"sd-ti-embedding\0" + text)]))


def test_a_picture_of_nothing_but_empty_chunks_is_given_up(tmp_path) -> None:
    assert "no embedding in its text" in refused(
        tmp_path, "card.png", png([]) + struct.pack(">I4sI", 0, b"aaaa", 0) * 200_000
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(EmbeddingFileError, match="no file"):
        reading.load(tmp_path / "pipe.pt")
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(RequestError, match="no file"):
        lists.read(tmp_path / "pipe.csv", COMMON)


def test_a_list_that_nests_deeply(tmp_path) -> None:
    (tmp_path / "list.json").write_text("[" * 100_000)
    with pytest.raises(RequestError, match="no JSON"):
        lists.read(tmp_path / "list.json", COMMON)


def test_lines_of_text_with_both_prompts_wanted(tmp_path) -> None:
    (tmp_path / "list.txt").write_text("word\ta red star")
    (line,), _ = lists.read(tmp_path / "list.txt", replace(COMMON, target=Target.BOTH, negative="blurry"))
    assert (line.request.prompt, line.request.negative) == ("a red star", "blurry")


@pytest.mark.parametrize(("name", "usable"), [("0\u00a0", "0"), ("\u2003", ""), ("x" + " " * 100_000 + "y", "x")])
def test_names_with_space_of_other_kinds_are_cleaned(name, usable) -> None:
    assert cleaned(name) == usable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": "a " * 10_001}, "20002 characters"),
        ({"negative": "\ud83d"}, "negative has a character that is no text"),
        ({"sentence": ("{} \0",)}, "sentence has a character"),
        ({"out": "a\0b"}, "out has a character"),
        ({"init": 5}, "init is 5: it must be text"),
    ],
)
def test_texts_that_no_parser_should_get(change, words) -> None:
    with pytest.raises(RequestError, match=words):
        replace(REQUESTS, **change).validate()


def test_a_folder_whose_name_is_too_long_is_said(tmp_path) -> None:
    from lib_estimate.files.destination import free_path

    with pytest.raises(EmbeddingFileError, match="can't be looked at"):
        free_path(replace(REQUESTS, out=str(tmp_path), subfolder="x" * 300))
