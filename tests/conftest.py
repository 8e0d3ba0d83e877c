"""Fixtures: the small trained model, loaded once, and requests short enough for tests.

Nothing of the standalone host is imported before a test asks for it: where its libraries are missing, the rest runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from lib_estimate import job
from lib_estimate.progress import Cancel
from lib_estimate.request import HOLE, EstimateRequest, ModelOptions, Part, Use
from lib_estimate.target.bank import TRAIN, build_bank, latent_noise
from lib_estimate.target.queries import Recorder
from lib_estimate.target.recording import Material
from lib_estimate.target.target import build_target
from tests.left_out import PROJECT, left_out

if TYPE_CHECKING:
    from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession

SHAPES_SD = Path(__file__).parent / "shapes_sd" / "shapes_sd.safetensors"
VOCABULARY = Path(__file__).parent / "shapes_sd" / "tokenizer"


torch.set_num_threads(1)  # every core has a test of its own
os.environ["OMP_NUM_THREADS"] = "1"

MISSING = left_out()
collect_ignore = [str(path) for path in MISSING]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for path, libraries in MISSING.items():
        terminalreporter.write_line(f"Left out: {path.relative_to(PROJECT)} (not installed: {', '.join(libraries)}).")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest in one piece comes first, so that no core waits for it at the end."""
    items.sort(key=lambda item: "webui" not in item.path.parts)


@pytest.fixture(scope="session")
def host() -> StandaloneHost:
    pytest.importorskip("diffusers", reason="the standalone host: diffusers is not installed")
    from lib_estimate.hosts.standalone import StandaloneHost

    return StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu"))


@pytest.fixture(scope="session")
def relatives(host: StandaloneHost, tmp_path_factory: pytest.TempPathFactory) -> list[StandaloneHost]:
    """The small model and its fine-tunes."""
    from lib_estimate.hosts.standalone import StandaloneHost
    from tests.shapes_sd import variants

    folder = tmp_path_factory.mktemp("variants")
    paths = [variants.write(style, folder) for style in variants.STYLES]
    return [host, *(StandaloneHost(ModelOptions(model=str(path), device="cpu")) for path in paths)]


@pytest.fixture(scope="session")
def float16_on_cpu() -> None:
    try:
        torch.nn.functional.layer_norm(torch.zeros(1, 2, dtype=torch.float16), (2,))
    except RuntimeError as error:
        pytest.skip(f"PyTorch {torch.__version__} calculates no float16 on a CPU: {error}")


@pytest.fixture()
def session(host: StandaloneHost):
    with host.session() as session:
        yield session


@pytest.fixture
def short(tmp_path: Path) -> EstimateRequest:
    """A request that runs in a second or two and still learns something, with the unet part unless changed."""
    return EstimateRequest(
        prompt="a (red:1.6) circle",
        name="short",
        part=Part.UNET,
        use=Use.WHOLE,
        out=str(tmp_path),
        steps=2,
        trajectories=1,
        sampling_steps=8,
        images=0,
        sentence=("a photo of {}",),
    )


def run(request: EstimateRequest, host, cancel: Cancel | None = None) -> job.Outcome:
    *_, outcome = job.estimate(request, host, cancel)
    return outcome


def record(session: StandaloneSession, request: EstimateRequest, sentence: str = HOLE) -> Material:
    """What a request learns from, in a sentence; its bank has the references of a report as well."""
    target = build_target(request, session, sentence)
    recorder = Recorder(request.queries, request.sampling_steps, 2**30, request.seed)
    noise = latent_noise(request, session, TRAIN, request.trajectories)
    *_, bank = build_bank(session, target, noise, request.cfg_scale, watch=recorder.see)
    queries = recorder.queries(bank.step, torch.arange(len(bank)))
    return Material(session, target, bank, bank, queries, queries)


def all_parameters(host: StandaloneHost) -> list[torch.Tensor]:
    networks = host.parts.networks()
    return [p.detach().clone() for network in networks for p in network.parameters()]
