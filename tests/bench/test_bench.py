"""The old way the benchmark compares with: its step is the sampler's, and its loss is what it says."""

from __future__ import annotations

import math

import pytest
import torch

from lib_estimate.learn.initial import initial_vectors
from lib_estimate.target.target import Target, build_target
from tests.bench.measure import counting, trajectories
from tests.bench.old_way import OldWay, ancestral, dpmpp_sde_step

SILENCE = (torch.zeros(1), torch.zeros(1))


@pytest.fixture
def way(host, session, short) -> OldWay:
    target = build_target(short, session)
    bank = trajectories(session, short, target, 2, references=False)
    return OldWay(session, target, bank, host.parts.alphas_cumprod, short.prompt, short.cfg_scale)


def noises(way: OldWay) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(way.bank.x[:1].shape, generator=generator) for _ in range(2))


def gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The best estimate of x_0 where x_0 is standard normal; the sampler's ODE is then solved by sqrt(1 + sigma^2)."""
    return x / (1 + sigma**2)


def test_down_and_up_make_the_noise_level() -> None:
    down, up = ancestral(3.0, 2.0)
    assert math.hypot(down, up) == pytest.approx(2.0)
    assert 0 < down < 2.0
    assert ancestral(3.0, 2.0, eta=0.0) == (2.0, 0.0)


def test_without_noise_a_step_is_one_of_second_order_of_the_ode() -> None:
    x = torch.ones(1, dtype=torch.float64)

    def off(ratio: float) -> float:
        sigma, sigma_to = 2.0, 2.0 * ratio
        exact = x * math.sqrt((1 + sigma_to**2) / (1 + sigma**2))
        return float((dpmpp_sde_step(gaussian, x, sigma, sigma_to, SILENCE, eta=0.0) - exact).abs())

    # Half the step in log sigma: an eighth of the error.
    assert off(0.9) < 1e-4
    assert off(0.9) / off(math.sqrt(0.9)) == pytest.approx(8, rel=0.15)


def test_a_small_step_keeps_the_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, *pair = (torch.randn(200_000, generator=generator, dtype=torch.float64) for _ in range(3))
    x = dpmpp_sde_step(gaussian, math.sqrt(1 + 2.0**2) * x, 2.0, 1.8, tuple(pair))
    assert float(x.var()) == pytest.approx(1 + 1.8**2, rel=0.02)


def test_equal_conditioning_leaves_no_loss(way, session, short, monkeypatch) -> None:
    start, pair = initial_vectors(short, session), noises(way)
    assert way.loss(start, 3, pair) > 0
    monkeypatch.setattr(Target, "embed", lambda self, session, vectors: session.encode([short.prompt]))
    assert way.loss(start, 3, pair) == 0


def test_a_step_starts_on_the_targets_trajectory(way, session, short, monkeypatch) -> None:
    seen, predict = [], session.predict_noise
    monkeypatch.setattr(session, "predict_noise", lambda x, t, c: seen.append((x, t)) or predict(x, t, c))
    way.step(2, session.encode([short.prompt]), noises(way))
    (x, timestep), (_, halfway) = seen
    here, there = way.bank.timestep[2], way.bank.timestep[2 + way.seeds]
    assert torch.allclose(x, way.bank.x[2:3].expand(2, -1, -1, -1), atol=1e-5)
    assert torch.allclose(timestep, here.float(), atol=1e-2)
    assert (there < halfway).all()
    assert (halfway < here).all()


def test_the_gradient_reaches_the_vectors(way, session, short) -> None:
    vectors = {key: rows.requires_grad_(True) for key, rows in initial_vectors(short, session).items()}
    with counting(session) as count:
        loss = way.loss(vectors, 3, noises(way))
        loss.backward()
    assert loss > 0
    assert all(rows.grad.norm() > 0 and torch.isfinite(rows.grad).all() for rows in vectors.values())
    assert (count.forwards, count.backwards) == (8, 4)
