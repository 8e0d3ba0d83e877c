"""The tab offers to go on with a run whose program ended."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from lib_estimate import job
from lib_estimate.files import reading
from lib_estimate.files.claim import claimed, state_path
from lib_estimate.interfaces import tab as tab_module
from lib_estimate.interfaces.standalone_tab import StandaloneShell
from lib_estimate.progress import StepReport
from lib_estimate.request import EstimateRequest, Part
from tests.interfaces.test_tab import Batched


@pytest.fixture
def request_(short) -> EstimateRequest:
    given = {
        "sampling_steps": 4,
        "width": 64,
        "height": 64,
        "checkpoint_every": 1,
        "part": Part.TRANSFORMER,
        "steps": 4,
    }
    return replace(short, name="my word", prompt="a (red:1.6) <circle>", **given)


def stop(request: EstimateRequest, host) -> None:
    running = job.estimate(request, host)
    next(p for p in running if isinstance(p, StepReport) and p.step == 3)
    running.close()


def made(shell: StandaloneShell) -> tab_module.Tab:
    tab = tab_module.Tab(shell)
    with tab_module.gr.Blocks():
        tab.lay_out()
    return tab


def test_it_is_found_whenever_the_page_is_opened_and_gone_on_with(host, request_, tmp_path) -> None:
    shell = Batched(host, tmp_path / "out")
    tab = made(shell)
    assert tab.stopped.look() == [tab_module.gr.update(visible=False), "", ""]
    stop(replace(request_, out=shell.folder), host)
    shown, said, name = tab.stopped.look()
    assert shown["visible"] is True
    for words in ("step 2 of 4", "my word", "a (red:1.6) &lt;circle&gt;"):
        assert words in said
    *_, last = tab._run_stopped([name])
    assert "Saved" in last[0]
    assert "goes on where it was stopped" in last[3]
    assert reading.load(Path(shell.folder) / "my word.pt").metadata["step"] == 4
    assert tab.stopped.look()[2] == ""
    *_, last = tab._run_stopped([name])
    assert "no stopped run" in last[3]


def test_the_newest_comes_first_and_each_can_be_dropped(host, request_, tmp_path) -> None:
    shell = Batched(host, tmp_path)
    tab = made(shell)
    for name, age in (("old", 1000), ("new", 0)):
        request = replace(request_, name=name)
        stop(request, host)
        path = state_path(tmp_path, name)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    shown, said, name = tab.stopped.look()
    assert name == "new"
    assert "1 more such run can" in said
    with claimed(tmp_path, "new"):  # somebody goes on with it
        assert tab.stopped.look()[2] == "old"
        assert "right now" in tab.stopped.dropped("new")[1]
    assert tab.stopped.dropped("new")[2] == "old"
    assert tab.stopped.dropped("old")[2] == ""
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_then_is_a_sentence_and_a_report_without_the_prompt(host, request_, tmp_path) -> None:
    tab = made(Batched(host, tmp_path))
    stop(request_, host)
    tab.shell.host = lambda: int(request_.prompt)
    *_, last = tab._run_stopped([request_.name])
    assert "Unexpected ValueError" in last[3]
    report = last[3].partition("bug report")[2]
    assert "ValueError" in report
    assert "red" not in report
    assert tab.stopped.look()[2] == request_.name  # it is still there


def test_what_is_no_state_is_not_offered(tmp_path, host) -> None:
    (tmp_path / ".embedding-estimate-0123456789abcdef.run").write_bytes(b"nothing")
    assert made(Batched(host, tmp_path)).stopped.look()[2] == ""


def test_the_page_looks_when_it_loads_and_after_each_run(host, tmp_path) -> None:
    blocks = tab_module.build(Batched(host, tmp_path))
    looks = [f.targets for f in blocks.fns.values() if getattr(f.fn, "__name__", "") == "look" and len(f.outputs) == 3]
    assert {event for targets in looks for _, event in targets} == {"click", "load", "then"}
