"""The benchmark: the old way it compares with is what it says, and what it counts and prints is what was run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import learn
from lib_estimate.progress import Cancel
from lib_estimate.request import Effort, Part, Use
from lib_estimate.target.recording import materials_of
from lib_estimate.target.target import Target, build_target
from tests.bench import compare
from tests.bench.measure import Count, Course, counting, drained, trajectories
from tests.bench.old_way import OldWay, ancestral, dpmpp_sde_step
from tests.bench.projection import Estimate, Prices, counted, projected

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
    before = session.forwards
    with counting(session) as count:
        loss = way.loss(vectors, 3, noises(way))
        loss.backward()
    assert loss > 0
    assert all(rows.grad.norm() > 0 and torch.isfinite(rows.grad).all() for rows in vectors.values())
    assert (count.forwards, count.backwards) == (8, 4)
    assert session.forwards - before == count.equivalents == 16


# ---- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"part": Part.UNET},
        {"part": Part.AUTO, "steps": 3},  # each of the three stages, the last with U-Net and sketch
        {"part": Part.AUTO, "use": Use.ANYWHERE, "effort": Effort.QUICK},
        {"part": Part.AUTO, "prompt": "a (red:1.6) circle AND a square"},
    ],
    ids=lambda changes: ", ".join(str(getattr(value, "value", value)) for value in changes.values()),
)
def test_what_a_session_counts_is_what_is_seen_from_outside(session, short, changes) -> None:
    request, cancel = replace(short, sampling_steps=3, **changes), Cancel()
    with counting(session) as count:
        materials = drained(materials_of(request, session, build_target(request, session), cancel))
        recorded = count.equivalents
        assert session.forwards == recorded > 0
        drained(learn(request, session, materials, initial_vectors(request, session), cancel))
    assert session.forwards == count.equivalents > recorded
    assert count.backwards > 0


def test_a_course_gives_what_was_known_at_a_mark() -> None:
    count = Count()
    course = Course(count)
    for forwards in (0, 60, 60, 99, 101, 400):
        count.forwards = forwards
        course.note({"clip_l": torch.full((1, 1), float(len(course.points)))})
    points = course.thinned((50, 100))
    assert points[0] is course.points[0]
    assert course.points[1] not in points  # at the same time there was something better
    assert course.points[3] in points
    assert points[-1] is course.points[-1]
    curve = [(point.forwards, 1 - 0.1 * float(point.vectors["clip_l"])) for point in points]
    shares = [compare.at_mark(curve, mark, None) for mark in (50, 100, 3000)]
    assert shares == pytest.approx([1.0, 0.7, 0.5])
    assert compare.at_mark(curve, 1000, budget=400) is None
    assert compare.reached(curve, 0.85) == 60
    assert compare.reached(curve, 0.4) is None


def test_leaving_the_weights_out_leaves_everything(session, short) -> None:
    judge = compare.Judge(session, replace(short, sampling_steps=3, images=1), pixels=True)
    start = initial_vectors(short, session)
    assert judge.share(start) == pytest.approx(1, abs=1e-3)
    end = judge.in_the_end(start)
    assert end["latents_share"] == pytest.approx(1, abs=1e-2)
    assert end["pixel_difference"] == pytest.approx(end["unweighted_pixel_difference"], rel=1e-2)


def test_a_summary_takes_what_was_never_reached_for_infinitely_late() -> None:
    def row(way: str, share: float, reached: int | None) -> compare.Row:
        return {
            "prompt": "p", "way": way, "forward_equivalents": 300, "share": share, "shares": {"50": share},
            "latents_share": share, "pixel_difference": None, "reached_old_way": reached,
        }  # fmt: skip

    auto = compare.AUTO[0]
    rows = [row(compare.OLD_WAY, 0.5, 300), row(auto, 0.2, 100), row(auto, 0.4, 150), row(auto, 0.9, None)]
    _, own = compare.summary(rows)
    assert (own["share"], own["worst"]["shares"]["50"], own["pixel_difference"]) == (0.4, 0.9, None)
    assert (own["reached_old_way"], own["worst"]["reached_old_way"]) == (150, None)
    assert compare.sooner(rows, auto) == [3.0, 2.0, 0.0]


def test_an_estimate_is_priced_by_what_it_ran(host, short) -> None:
    run = counted(replace(short, part=Part.AUTO, effort=Effort.QUICK, sampling_steps=3, images=1), host)
    assert (run.pictures, run.evaluations["cross-attention"] > 0, run.evaluations["sketch"] > 0) == (3, True, True)
    prices = Prices({"cross-attention": 0.1, "sketch": 0.5}, {"cross-attention": 0.0}, {"sketch": 1.5}, 2.0)
    ran = Estimate({"recording": 60}, {"cross-attention": 10, "sketch": 4, None: 3}, {}, {"sketch": 2}, 6, 0)
    assert projected(ran, prices) == {
        "recording: U-Net": 60,
        "learning: losses without the U-Net": 3.0,
        "learning: their checks": 0,
        "learning: their set-up": 3.0,
        "report: pictures decoded": 12.0,
    }
