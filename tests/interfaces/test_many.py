"""The command `batch`, as a person or a launcher of several processes meets it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lib_estimate import batch
from lib_estimate.files import reading
from lib_estimate.hosts import standalone
from lib_estimate.interfaces import cli, many
from lib_estimate.request import ModelOptions
from tests.conftest import SHAPES_SD

QUICK = [
    "--model", str(SHAPES_SD), "--effort", "quick", "--part", "cross-attention", "--steps", "2", "--images", "0",
    "--width", "64", "--height", "64", "--sampling-steps", "4", "--sentence", "a small {}", "--use", "whole",
]  # fmt: skip
TEXT = "day\ta (red:1.6) circle\nnight\ta (blue:1.5) square\n"


@pytest.fixture
def loaded(host, monkeypatch) -> list[Path]:
    """The models that were loaded: none anew, as the tests have this one already."""
    paths = []

    def load(path: Path, dtype: object) -> object:
        paths.append(path)
        return host.parts

    monkeypatch.setattr(standalone.checkpoint, "load", load)
    return paths


def run(tmp_path: Path, text: str, *more: str, name: str = "list.txt") -> int:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return cli.main(["batch", str(tmp_path / name), "--out", str(tmp_path / "out"), *QUICK, *more])


def made(tmp_path: Path) -> list[str]:
    return sorted(path.stem for path in (tmp_path / "out").glob("*.pt"))


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def test_a_list_is_made_on_one_model_and_told_in_a_table(tmp_path, capsys, loaded) -> None:
    styles = 'name,prompt,negative_prompt\n"day:1","a (red:1.6) circle, {prompt}",(blue:1.3)\nnight,(a:1.5.2),\n'
    sheet = tmp_path / "tables" / "t.csv"
    assert run(tmp_path, styles, "--table", str(sheet), name="styles.csv") == 1
    assert loaded == [SHAPES_SD]
    assert made(tmp_path) == ["day-1", "day-1-neg"]
    rows = table(sheet)
    assert [row["state"] for row in rows.values()][:2] == ["made", "made"]
    assert rows["day-1"]["vectors"] == "3"
    assert float(rows["day-1"]["cost_in_pictures"]) > 1
    assert "1.5.2" in rows["night"]["state"]
    printed = capsys.readouterr()
    assert "3 lines: 2 made, 1 failed." in printed.out
    assert '"day-1"' in printed.err
    assert reading.load(tmp_path / "out" / "day-1-neg.pt").metadata["settings"]["target"] == "negative"

    assert run(tmp_path, styles.replace("1.5.2", "1.5"), name="styles.csv") == 0  # mended, and run again
    assert "3 lines: 2 made before, 1 made." in capsys.readouterr().out


def test_json_requests_win_over_the_flags(tmp_path, loaded) -> None:
    assert run(tmp_path, '[{"name": "day", "prompt": "a (red:1.6) circle", "seed": 7}]', name="list.json") == 0
    settings = reading.load(tmp_path / "out" / "day.pt").metadata["settings"]
    assert (settings["seed"], settings["effort"], settings["width"]) == (7, "quick", 64)


def test_what_is_wrong_is_said_before_the_model_is_loaded(tmp_path, capsys, loaded) -> None:
    assert run(tmp_path, TEXT + "DAY\tx\na/b\tx\n") == 1
    said = capsys.readouterr()
    assert "line 3: " in said.err
    assert "line 4: " in said.err
    assert said.out == ""
    assert loaded == made(tmp_path) == []


def test_ctrl_c_saves_the_line_and_stops(tmp_path, capsys, loaded, monkeypatch) -> None:
    def press(bars: object, progress: object) -> None:
        if getattr(progress, "step", 0) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli._Bars, "show", press)
    assert run(tmp_path, TEXT, "--steps", "50") == many.STOPPED_BY_USER
    assert made(tmp_path) == ["day"]
    said = capsys.readouterr().out
    assert batch.STOPPED in said
    assert batch.NOT_STARTED in said


def test_ctrl_c_twice_drops_the_line_and_tells_of_the_others(tmp_path, capsys, loaded, monkeypatch) -> None:
    def press(bars: object, progress: object) -> None:
        if made(tmp_path) and getattr(progress, "step", 0) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli._Bars, "show", press)
    assert run(tmp_path, TEXT, "--steps", "50") == many.STOPPED_BY_USER
    assert made(tmp_path) == ["day"]
    assert "1 made, 1 not started" in capsys.readouterr().out


def test_two_processes_share_the_lines_out(tmp_path) -> None:
    (tmp_path / "list.txt").write_text(TEXT + "dusk\ta circle\nbad\t(a:1.5.2)\n", encoding="utf-8")
    sheet = tmp_path / "t.csv"
    command = [
        sys.executable, "-m", "lib_estimate", "batch", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out"),
        "--table", str(sheet), "--device", "cpu", *QUICK,
    ]  # fmt: skip
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    (first, first_err), (second, second_err) = (process.communicate(timeout=300) for process in both)
    # The failed line was the second one's, but a launcher would end the first at once if the second said so.
    assert [process.returncode for process in both] == [1, 0], (first_err, second_err)
    assert made(tmp_path) == ["day", "dusk", "night"]
    assert "4 lines: 3 made, 1 failed." in first
    assert second == ""
    assert [row["state"][:6] for row in table(sheet).values()] == ["made", "made", "made", "failed"]
    assert "(1 of 4)" in first_err
    assert "(3 of 4)" in first_err
    assert "(2 of 4)" not in first_err
    assert "(2 of 4)" in second_err
    assert not list(tmp_path.glob("*.json"))


def test_each_process_has_a_gpu_of_its_own(monkeypatch) -> None:
    import torch

    share = batch.Share(3, 4, 3)
    assert many.own_device(ModelOptions(device="cpu"), share).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert many.own_device(ModelOptions(), share).device == "cuda:1"
    assert many.own_device(ModelOptions(device="cuda:0"), share).device == "cuda:0"
    assert many.own_device(ModelOptions(), batch.Share()).device == "auto"
