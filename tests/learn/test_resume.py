"""A stopped run goes on to the same vectors as one that was never stopped; and what it left is read without trust."""

from __future__ import annotations

import io
from copy import copy
from dataclasses import replace

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import EstimateError
from lib_estimate.files.claim import state_path
from lib_estimate.learn import count, resume
from lib_estimate.learn.fit import Fit
from lib_estimate.learn.registry import available_optimizers
from lib_estimate.progress import Cancel, Interrupted, Note, Phase, StepReport
from lib_estimate.request import AUTO_VECTORS, Effort, Emphasis, EstimateRequest, Part, Use
from tests.conftest import run
from tests.learn.test_fit import BASE, GOAL, STAGE, Bowl, make


@pytest.fixture(autouse=True)
def _no_report(monkeypatch) -> None:
    """What the report finds is not the matter here."""

    def nothing(request, sessions, alone, *_):
        yield Phase("Measuring", 0, 1)
        return job.exact_on(sessions, alone[0], ())

    monkeypatch.setattr(job, "_report", nothing)


@pytest.fixture
def small(short) -> EstimateRequest:
    given = {"sampling_steps": 4, "width": 64, "height": 64, "part": Part.CROSS_ATTENTION, "steps": 6}
    return replace(short, out=f"{short.out}/out", checkpoint_every=2, **given)


def stopped(request: EstimateRequest, host, steps: int) -> None:
    """A run whose process ends at the so manieth step."""
    running = job.estimate(request, host)
    seen = 0
    for progress in running:
        seen += isinstance(progress, StepReport)
        if seen == steps:
            running.close()
            return
    raise AssertionError("it ended before")


def resumed(request: EstimateRequest, host) -> tuple[list, job.Outcome]:
    *told, outcome = job.estimate(replace(request, resume=True), host)
    return told, outcome


def state_of(request: EstimateRequest):
    return state_path(request.out, request.name)


@pytest.mark.parametrize(
    ("change", "stop"),
    [
        ({"part": Part.AUTO, "steps": 8}, 8),  # before the third, which goes on with what L-BFGS has learnt
        ({"part": Part.AUTO, "use": Use.ANYWHERE, "effort": Effort.QUICK, "steps": 4, "ema": 0.5}, 3),
        ({"prompt": "(red:1.6) dot", "vectors": AUTO_VECTORS, "tolerance": 0.0}, 5),
    ],
    ids=["three stages", "in sentences", "number by trial"],
)
def test_it_comes_to_the_same_vectors(change, stop, host, small, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(count, "TRIAL_STEPS", 2)
    request = replace(small, **change)
    whole = run(replace(request, out=str(tmp_path / "whole")), host)
    stopped(replace(request, overwrite=True), host, stop)
    assert state_of(request).exists()
    told, outcome = resumed(replace(request, overwrite=True), host)
    steps = sum(isinstance(progress, StepReport) for progress in told)
    assert len(whole.losses) - stop <= steps < len(whole.losses)
    assert not any(isinstance(progress, Phase) and "numbers" in progress.name for progress in told)
    assert all(torch.equal(rows, outcome.embedding.vectors[key]) for key, rows in whole.embedding.vectors.items())
    assert outcome.losses == whole.losses
    assert outcome.record["stages"] == whole.record["stages"]
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")] == []


def copy_of(state: dict) -> dict:
    """As a file gives it back."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)


@pytest.mark.parametrize("optimizer", available_optimizers())
def test_every_optimizer_goes_on(optimizer) -> None:
    stage, request = replace(STAGE, optimizer=optimizer, learning_rate="", steps=12), replace(BASE, ema=0.5, warmup=3)

    kept: list[dict] = []
    whole = make(stage, request)
    list(whole.run())
    first = make(stage, request)
    first.keep = lambda fit: kept.append(copy_of(fit.state()))
    list(first.run())
    second = make(stage, request)
    second.restore(kept[5])
    assert second.steps_run == 6
    list(second.run())
    assert second.losses == whole.losses
    assert torch.equal(second.best["clip_l"], whole.best["clip_l"])
    assert torch.equal(second.vectors["clip_l"], whole.vectors["clip_l"])


def test_a_rate_that_was_halved_stays_halved() -> None:
    class Broken(Bowl):
        def losses(self, vectors, entries):
            for loss in super().losses(vectors, entries):
                yield loss * float("nan") if self.calls == 3 else loss

    stage, kept = replace(STAGE, steps=12), []
    whole = make(stage, objective=Broken())
    whole.keep = lambda fit: kept.append(copy_of(fit.state()))
    list(whole.run())
    second = make(stage)
    second.restore(kept[5])
    list(second.run())
    assert second.halvings == whole.halvings == 1
    assert torch.equal(second.vectors["clip_l"], whole.vectors["clip_l"])


def test_patience_is_counted_on() -> None:
    stage, request = replace(STAGE, steps=100, learning_rate="1e-9", schedule="constant"), replace(BASE, patience=3)
    whole, first, second = (make(stage, request, start=GOAL.clone()) for _ in range(3))
    list(whole.run())
    first.keep = lambda fit: second.restore({**fit.state()}) if fit.steps_run == 12 else None
    list(first.run())
    list(second.run())
    assert second.stopped == whole.stopped
    assert second.steps_run == whole.steps_run


def test_where_all_was_learnt_only_the_report_is_made(host, small) -> None:
    *_, last = (p for p in job.estimate(small, host) if isinstance(p, StepReport))
    running = job.estimate(replace(small, overwrite=True), host)
    for progress in running:
        if isinstance(progress, StepReport) and progress.step == last.steps:
            break
    next(running)  # the report has begun
    kept = state_of(small).read_bytes()
    running.close()  # saves what was learnt, so nothing is kept
    assert not state_of(small).exists()
    state_of(small).write_bytes(kept)  # as if the process had died there
    told, outcome = resumed(replace(small, overwrite=True), host)
    assert not any(isinstance(p, StepReport) or (isinstance(p, Phase) and "ecord" in p.name) for p in told)
    assert len(outcome.losses) == last.steps


def test_a_run_without_resume_begins_anew_and_says_so(host, small) -> None:
    stopped(small, host, 5)
    *told, outcome = job.estimate(small, host)
    assert any(isinstance(p, Note) and "stopped at step 4 of 6 (cross-attention)" in p.text for p in told)
    assert sum(isinstance(p, StepReport) for p in told) == 6
    assert not state_of(small).exists()
    told, _ = resumed(replace(small, overwrite=True), host)
    assert Note(resume.NONE_STOPPED) in told


def test_what_ends_a_run_takes_its_state_away_and_a_crash_does_not(host, small) -> None:
    for wanted, left in (("discard", False), ("crash", True)):
        cancel = Cancel()
        running = job.estimate(small, host, cancel)
        next(progress for progress in running if isinstance(progress, StepReport) and progress.step == 3)
        assert state_of(small).exists()
        with pytest.MonkeyPatch.context() as broken:
            cancel.discard() if wanted == "discard" else broken.setattr(Fit, "_check", _crash)
            with pytest.raises((Interrupted, RuntimeError)):
                list(running)
        assert state_of(small).exists() == left
    cancel.save()
    with pytest.raises(Interrupted, match="before the learning"):  # of the run that would have gone on
        list(job.estimate(replace(small, resume=True), host, cancel))
    assert state_of(small).exists()


def _crash(*_) -> float:
    raise RuntimeError("CUDA error")


def test_another_request_or_checkpoint_is_refused(host, small, relatives) -> None:
    stopped(small, host, 3)
    kept = state_of(small).read_bytes()
    for change, match in (
        ({"seed": 7}, "its seed was 0, not 7"),
        ({"prompt": "a (blue:1.6) circle"}, "its prompt was"),
    ):
        with pytest.raises(EstimateError, match=match):
            resumed(replace(small, **change), host)
    with pytest.raises(EstimateError, match="on another checkpoint"):
        resumed(small, relatives[1])
    assert state_of(small).read_bytes() == kept
    resumed(replace(small, images=1, checkpoint_every=50), host)  # which change nothing that is learnt


def test_a_prompt_that_is_read_otherwise_is_refused(host, small) -> None:
    stopped(small, host, 3)
    other = copy(host)
    other.options = replace(host.options, emphasis=Emphasis.NONE)
    with pytest.raises(EstimateError, match="reads the prompt otherwise"):
        resumed(small, other)


class Evil:
    def __reduce__(self):
        return print, ("evil was here",)


def test_a_damaged_or_foreign_state_is_refused(host, small, capsys) -> None:
    stopped(small, host, 3)
    path = state_of(small)
    good = path.read_bytes()
    content = torch.load(io.BytesIO(good), weights_only=True)

    def bytes_of(**changes) -> bytes:
        buffer = io.BytesIO()
        torch.save({**content, **changes}, buffer)
        return buffer.getvalue()

    fit = content["fit"]
    wrong = {
        "cut": good[: len(good) // 2],
        "empty": b"",
        "code": bytes_of(start=Evil()),
        "newer": bytes_of(version=99),
        "kind": bytes_of(losses="many"),
        "more": bytes_of(unknown=1),
        "shape": bytes_of(best={"clip_l": torch.zeros(1, 1)}),
        "nan": bytes_of(start={key: rows * float("nan") for key, rows in content["start"].items()}),
        "step": bytes_of(fit={**fit, "steps_run": 10**9}),
        "optimizer": bytes_of(fit={**fit, "optimizer": {"state": {}, "param_groups": []}}),
        "generator": bytes_of(fit={**fit, "generator": torch.zeros(3)}),
    }
    for what, data in wrong.items():
        path.write_bytes(data)
        with pytest.raises(EstimateError, match="Leave --resume out"):
            resumed(small, host)
        assert path.read_bytes() == data, what
    assert "evil" not in capsys.readouterr().out


def test_a_state_that_cannot_be_written_stops_nobody(host, small, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume.os, "replace", full)
    *told, outcome = job.estimate(small, host)
    assert told.count(Note(resume.NOT_KEPT.format(why="No space left on device"))) == 1
    assert len(outcome.losses) == 6


def test_nothing_is_kept_where_nothing_is_wanted(host, small) -> None:
    stopped(replace(small, checkpoint_every=0), host, 5)
    assert not state_of(small).exists()
