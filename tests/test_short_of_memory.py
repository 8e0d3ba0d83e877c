"""Memory that runs out in each phase of a run: lived with while there is less to take at once, else said."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import OutOfMemory, ReportFailed
from lib_estimate.files import reading
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn.fit import Fit
from lib_estimate.request import EstimateRequest, Part, Use
from tests.conftest import all_parameters, run


class Full(torch.cuda.OutOfMemoryError):
    """As CUDA says it."""

    def __init__(self) -> None:
        super().__init__("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB.")


@pytest.fixture(scope="module")
def request_(tmp_path_factory) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (red:1.6) circle", name="full", part=Part.UNET, use=Use.WHOLE, steps=1, trajectories=2,
        sampling_steps=2, images=2, width=64, height=64, out=str(tmp_path_factory.mktemp("full")), overwrite=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def roomy(request_, host) -> job.Outcome:
    return run(request_, host)


def with_room_for(latents: int, monkeypatch) -> list[int]:
    """The U-Net takes so many latents at once; those that it was asked to take."""
    asked, predict = [], StandaloneSession.predict_at_once

    def little_room(self, x, timestep, conditioning):
        asked.append(len(x))
        if len(x) > latents:
            raise Full
        return predict(self, x, timestep, conditioning)

    monkeypatch.setattr(StandaloneSession, "predict_at_once", little_room)
    return asked


def test_with_room_for_one_latent_the_same_comes_out(host, request_, roomy, monkeypatch) -> None:
    """Recording, learning, checks and report take one at a time."""
    asked = with_room_for(1, monkeypatch)
    tight = run(request_, host)
    assert max(asked) > 1
    assert asked.count(1) > len(asked) / 2
    assert tight.fidelity.error == pytest.approx(roomy.fidelity.error, rel=0.02)
    assert tight.fidelity.unweighted_error == pytest.approx(roomy.fidelity.unweighted_error, rel=1e-3)
    for name, pictures in roomy.fidelity.pictures.items():
        assert torch.allclose(pictures, tight.fidelity.pictures[name], atol=0.02), name


def everywhere(monkeypatch) -> None:
    with_room_for(0, monkeypatch)


def while_learning(monkeypatch) -> None:
    def full(*_):
        raise Full

    monkeypatch.setattr(Fit, "_backward", full)


def in_the_report(monkeypatch) -> None:
    learnt, run_fit = [], Fit.run

    def noted(self):
        yield from run_fit(self)
        learnt.append(1)

    def full(self, *given, predict=StandaloneSession.predict_at_once):
        if learnt:
            raise Full
        return predict(self, *given)

    monkeypatch.setattr(Fit, "run", noted)
    monkeypatch.setattr(StandaloneSession, "predict_at_once", full)


def in_the_pictures(monkeypatch) -> None:
    def full(self, latents):
        raise Full

    monkeypatch.setattr(StandaloneSession, "decode", full)


@pytest.mark.parametrize(
    ("phase", "saved"),
    [(everywhere, False), (while_learning, False), (in_the_report, True), (in_the_pictures, True)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_was_needed_is_said_and_what_was_learnt_is_kept(
    phase: Callable, saved: bool, host, request_, monkeypatch, tmp_path
) -> None:
    before, request = all_parameters(host), replace(request_, out=str(tmp_path))
    with monkeypatch.context() as patched:
        phase(patched)
        with pytest.raises(ReportFailed if saved else OutOfMemory, match=r"no room for 1\.50 GiB more.*--width"):
            run(request, host)
    assert [path.name for path in tmp_path.glob("full.*")] == (["full.pt"] if saved else [])
    if saved:
        assert reading.load(tmp_path / "full.pt").metadata["prompt"] == request.prompt
    assert all(torch.equal(a, b) for a, b in zip(before, all_parameters(host), strict=True))
    assert not any("forward" in vars(module) for module in host.parts.unet.modules())


def test_a_host_that_can_say_so_tells_the_figures(host, request_, monkeypatch) -> None:
    room = StandaloneSession.room
    monkeypatch.setattr(StandaloneSession, "room", lambda self: replace(room(self), free=2**20))
    with_room_for(0, monkeypatch)
    with pytest.raises(OutOfMemory, match=r"needs about [\d.]+ GB, 0\.0 are free\. What may fit: "):
        run(request_, host)
