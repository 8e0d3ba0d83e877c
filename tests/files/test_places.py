"""Places where no file can be written, told before the work; and after it, vectors that are saved elsewhere."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import namedtuple
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import EmbeddingFileError, EstimateError
from lib_estimate.files import places, rescue, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.files.places import check_place
from lib_estimate.files.reading import load
from lib_estimate.interfaces import cli


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def full(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_file_in_the_place_of_a_folder_is_named(tmp_path, below) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(EmbeddingFileError, match=r"file is a file, not a folder\. Choose another place"):
        check_place(tmp_path / "file" / below / "x.pt", "The embedding")
    assert tree(tmp_path) == ["file"]


def test_a_link_that_leads_nowhere_is_named(tmp_path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(EmbeddingFileError, match="link is a link that leads nowhere"):
        check_place(tmp_path / "link" / "x.pt", "The embedding")


def test_a_good_place_is_left_as_it_was(tmp_path) -> None:
    check_place(tmp_path / "new" / "newer" / "x.pt", "The embedding")
    assert tree(tmp_path) == []
    (tmp_path / "x.json").write_bytes(b"old")
    check_place(tmp_path / "x.json", "--json", in_place=True)
    assert (tmp_path / "x.json").read_bytes() == b"old"


def test_a_folder_where_a_file_is_to_be_and_devices(tmp_path) -> None:
    with pytest.raises(EmbeddingFileError, match="that is a folder"):
        check_place(tmp_path, "--json", in_place=True)
    check_place(Path(os.devnull), "--json", in_place=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_what_the_system_says_of_a_folder_is_passed_on(tmp_path, monkeypatch, code) -> None:
    def refuses(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(places, "open", refuses, raising=False)
    with pytest.raises(EmbeddingFileError, match=os.strerror(code)):
        check_place(tmp_path / "new" / "x.pt", "The embedding")
    assert tree(tmp_path) == []


def test_a_disk_that_is_nearly_full_is_refused(tmp_path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(EmbeddingFileError, match=r"has 1\.0 MB free, and 8 MB are needed"):
        check_place(tmp_path / "x.pt", "The embedding")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage(0, 0, 0))  # as some network drives say
    check_place(tmp_path / "x.pt", "The embedding")


def test_a_full_disk(full) -> None:
    with suppress(OSError):
        (full / "other").write_bytes(bytes(2**21))
    with pytest.raises(EmbeddingFileError, match="No space left on device"):
        check_place(full / "x.pt", "The embedding")
    assert tree(full) == ["other"]


def test_a_request_is_refused_before_there_is_a_model(short, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for change in ({"out": str(tmp_path / "file")}, {"subfolder": "file"}):
        with pytest.raises(EstimateError, match="is a file, not a folder"):
            next(job.estimate(replace(short, **change), host=None))
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("flag", ["--json", "--sheet", "--out"])
def test_the_command_line_refuses_outputs_before_the_model_is_read(flag, tmp_path, capsys) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    given = {"--out": str(tmp_path / "out"), flag: str(tmp_path / "file" / "x.png")}
    arguments = [piece for pair in given.items() for piece in pair]
    assert cli.main(["fit", "a (red:1.6) circle", "--name", "x", "--model", "missing", *arguments]) == 1
    said = capsys.readouterr().err
    assert "file is a file, not a folder" in said
    assert tree(tmp_path) == ["file"]


def test_a_table_and_a_picture_of_no_kind_are_refused_at_the_start(tmp_path, capsys) -> None:
    (tmp_path / "list.txt").write_text("x\ta (red:1.6) circle\n", encoding="utf-8")
    common = ["--model", "missing", "--out", str(tmp_path / "out")]
    assert (
        cli.main(["batch", str(tmp_path / "list.txt"), *common, "--table", str(tmp_path / "list.txt" / "t.csv")]) == 1
    )
    assert "--table can't be written" in capsys.readouterr().err
    assert cli.main(["fit", "(red:2)", "--name", "x", *common, "--sheet", str(tmp_path / "sheet.txt")]) == 1
    assert "must end in .png" in capsys.readouterr().err


# ---- after the work -----------------------------------------------------------------------------------------------


def embedding(name: str) -> Embedding:
    return Embedding(name, {"clip_l": torch.randn(2, 8)}, {"prompt": "a"})


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.setattr(rescue.tempfile, "gettempdir", lambda: str(folder))
    return folder


def no_room(monkeypatch, below: Path) -> None:
    """The disk below a folder is full."""
    write = writing._write

    def fails(plain, data, path, overwrite):
        if path.is_relative_to(below):
            raise EmbeddingFileError(f"{path.name} was not saved: No space left on device.")
        write(plain, data, path, overwrite)

    monkeypatch.setattr(writing, "_write", fails)


def test_vectors_are_saved_elsewhere_and_the_sentence_says_where(tmp_path, monkeypatch, elsewhere) -> None:
    made = embedding("word")
    no_room(monkeypatch, tmp_path / "out")
    for _ in range(2):  # nothing is overwritten there
        with pytest.raises(EmbeddingFileError, match="No space left") as caught:
            rescue.save_all([(made, tmp_path / "out" / "word.pt")], overwrite=True)
    found = list(elsewhere.rglob("*.pt"))
    assert len(found) == 2
    assert any(str(path) in str(caught.value) for path in found)
    assert torch.equal(load(found[0]).vectors["clip_l"], made.vectors["clip_l"])


def test_of_several_words_each_is_somewhere(tmp_path, elsewhere) -> None:
    made = [(embedding(name), tmp_path / f"{name}.pt") for name in ("a", "b", "c")]
    (tmp_path / "b.pt").write_bytes(b"came meanwhile")
    with pytest.raises(EmbeddingFileError) as caught:
        rescue.save_all(made, overwrite=False)
    (rescued,) = elsewhere.rglob("*.pt")
    for said in (str(rescued), f"{tmp_path / 'a.pt'} and {tmp_path / 'c.pt'} is saved"):
        assert said in str(caught.value)
    assert torch.equal(load(rescued).vectors["clip_l"], made[1][0].vectors["clip_l"])
    assert (tmp_path / "b.pt").read_bytes() == b"came meanwhile"
    assert load(tmp_path / "c.pt").name == "c"


def test_the_user_is_the_last_resort_and_nowhere_is_said(tmp_path, monkeypatch, elsewhere) -> None:
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(rescue.Path, "home", lambda: tmp_path / "home")
    no_room(monkeypatch, tmp_path / "out")
    write = [(embedding("word"), tmp_path / "out" / "word.pt")]
    elsewhere.rmdir()
    with pytest.raises(EmbeddingFileError, match="home"):
        rescue.save_all(write, overwrite=False)
    no_room(monkeypatch, tmp_path)
    with pytest.raises(EmbeddingFileError, match="Elsewhere they could not be saved"):
        rescue.save_all(write, overwrite=False)


def test_a_folder_that_vanishes_or_fills_up_during_a_run_loses_nothing(
    host, short, tmp_path, monkeypatch, elsewhere
) -> None:
    out = tmp_path / "out"
    progress = job.estimate(replace(short, out=str(out), steps=1), host)
    next(progress)
    no_room(monkeypatch, out)
    with pytest.raises(EstimateError, match="The vectors are not lost"):
        list(progress)
    (rescued,) = elsewhere.rglob("*.pt")
    assert load(rescued).metadata["prompt"] == short.prompt
    assert not out.exists()
