from __future__ import annotations

import importlib.util
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lib_estimate import choices
from lib_estimate.errors import RequestError
from lib_estimate.learn import registry
from lib_estimate.learn.registry import (
    LOSSES,
    OPTIMIZERS,
    SCHEDULES,
    available_optimizers,
    default_learning_rate,
    learning_rate_at,
    make_optimizer,
    missing_package,
    parse_learning_rate,
)

OPTIONAL = {name: entry.package for name, entry in OPTIMIZERS.items() if entry.package}


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine the two wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "help_lines", "factories"),
    [
        (choices.OPTIMIZERS, choices.OPTIMIZER_HELP, OPTIMIZERS),
        (choices.LOSSES, choices.LOSS_HELP, LOSSES),
        (choices.SCHEDULES, choices.SCHEDULE_HELP, SCHEDULES),
    ],
    ids=["optimizers", "losses", "schedules"],
)
def test_the_menu_and_the_factories_agree(names, help_lines, factories) -> None:
    assert names == tuple(help_lines) == tuple(factories)
    assert all(line.strip() and "\n" not in line for line in help_lines.values())


def test_the_names_need_no_torch() -> None:
    code = "import sys, lib_estimate.choices; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], timeout=60)
    assert done.returncode == 0


def test_the_help_names_the_package_a_choice_needs() -> None:
    assert all(package in choices.OPTIMIZER_HELP[name] for name, package in OPTIONAL.items())


# ---- optimizers ---------------------------------------------------------------------------------------------------


class Encoder:
    """A frozen random two-layer transformer after a position table, to be led to the states of vectors that exist."""

    def __init__(self, count: int, width: int, size: float) -> None:
        generator = torch.Generator().manual_seed(7)
        self.positions, goal, self.start = size * torch.randn(3, count, width, generator=generator)
        self.layers = torch.randn(2, 5, width, width, generator=generator) / width**0.5
        self.target = self.states(goal)
        self.scale = 1 / (self.states(self.start) - self.target).square().mean()

    def states(self, vectors: Tensor) -> Tensor:
        """[N, width] -> [N, width]"""
        x, width = vectors + self.positions, vectors.shape[1:]
        for q, k, v, up, down in self.layers:
            y = F.layer_norm(x, width)
            x = x + (y @ q @ (y @ k).T / width[0] ** 0.5).softmax(1) @ y @ v
            x = x + F.gelu(F.layer_norm(x, width) @ up) @ down
        return F.layer_norm(x, width)

    def loss(self, vectors: Tensor) -> Tensor:
        """1 at the start, 0 at the goal."""
        return (self.states(vectors) - self.target).square().mean() * self.scale

    def loss_out_of_touch(self, vectors: Tensor) -> Tensor:
        """The fault that a loss's value doesn't show: it has a gradient, but not the vectors'."""
        return self.loss(vectors.detach().requires_grad_(True))


NARROW = Encoder(8, 32, 0.03)
WIDE = Encoder(6, 96, 0.02)


def learn(name: str, encoder: Encoder, steps: int, schedule: str, loss=None) -> float:
    """The loss after steps at the default rate; it began at 1."""
    vectors = encoder.start.clone().requires_grad_(True)
    rate_at = learning_rate_at(default_learning_rate(name), schedule, 0, steps)
    optimizer = make_optimizer(name, [vectors], rate_at(0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = (loss or encoder.loss)(vectors)
        value.backward()
        return value

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        if OPTIMIZERS[name].closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    return encoder.loss(vectors).item()


def need(name: str) -> None:
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name].replace("-", "_"))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_at_its_default_rate(name) -> None:
    need(name)
    assert NARROW.loss(NARROW.start).item() == pytest.approx(1)
    steps = 20 if OPTIMIZERS[name].closure else 100
    assert learn(name, NARROW, steps, "cosine") < 0.1
    assert learn(name, WIDE, steps, "constant") < 0.1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_out_of_touch_with_the_vectors_is_noticed(name) -> None:
    """The test above fails when the vectors don't reach the loss."""
    need(name)
    assert learn(name, WIDE, 3, "constant", WIDE.loss_out_of_touch) == pytest.approx(1)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("Rprop", "LBFGS")])
def test_the_learning_rate_counts_at_every_step(name) -> None:
    """Rprop's and LBFGS's own step lengths are what sets them apart; every other follows the schedule."""
    need(name)

    def moved(rate: float) -> float:
        vectors = torch.ones(2, 4, requires_grad=True)
        optimizer = make_optimizer(name, [vectors], default_learning_rate(name))
        for step in range(12):
            optimizer.param_groups[0]["lr"] = default_learning_rate(name) if step < 8 else rate
            before = vectors.detach().clone()
            optimizer.zero_grad()
            vectors.square().sum().backward()
            optimizer.step()
        return (vectors - before).norm().item()

    assert moved(default_learning_rate(name) / 100) < 0.1 * moved(default_learning_rate(name))


def test_a_step_of_lbfgs_stays_short() -> None:
    vectors, calls = NARROW.start.clone().requires_grad_(True), 0
    optimizer = make_optimizer("LBFGS", [vectors], default_learning_rate("LBFGS"))

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = NARROW.loss(vectors)
        loss.backward()
        return loss

    for _ in range(10):
        optimizer.step(closure)
    assert calls <= 80


def test_adamw_lets_go_of_length_that_the_loss_does_not_ask_for() -> None:
    def length(name: str) -> float:
        """Of the half that the loss doesn't feel, after a default run; it began at 1."""
        vectors = (torch.ones(2, 4) / 2).requires_grad_(True)
        optimizer = make_optimizer(name, [vectors], default_learning_rate(name))
        rate_at = learning_rate_at(default_learning_rate(name), "cosine", 0, 300)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = rate_at(step)
            optimizer.zero_grad()
            (vectors * torch.tensor([[1.0], [0.0]])).square().sum().backward()
            optimizer.step()
        return vectors[1].norm().item()

    assert length("Adam") == pytest.approx(1)
    assert 0.9 < length("AdamW") < 0.99


def without(package: str, monkeypatch) -> None:
    find = importlib.util.find_spec
    module = package.replace("-", "_")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else find(name, *rest))


@pytest.mark.parametrize(("name", "package"), OPTIONAL.items())
def test_an_optimizer_whose_package_is_missing(name, package, monkeypatch) -> None:
    without(package, monkeypatch)
    assert name not in available_optimizers()
    assert missing_package(name) == package
    assert default_learning_rate(name) > 0
    with pytest.raises(RequestError, match=rf"'{name}' needs the package {package}: pip install {package}, or choose"):
        make_optimizer(name, [torch.zeros(1, 4, requires_grad=True)], 0.1)


@pytest.mark.parametrize(("name", "package"), OPTIONAL.items())
def test_an_optimizer_whose_package_is_broken(name, package, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: object())
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # its import raises ImportError
    with pytest.raises(RequestError, match=rf"{package} is installed but can't be loaded"):
        make_optimizer(name, [torch.zeros(1, 4, requires_grad=True)], 0.1)


def test_what_torch_has_is_always_available(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert available_optimizers() == tuple(name for name in OPTIMIZERS if name not in OPTIONAL)
    assert all(missing_package(name) is None for name in available_optimizers())


def test_optional_packages_are_loaded_only_when_chosen(monkeypatch) -> None:
    for package in OPTIONAL.values():
        monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)  # importing it raises ImportError
    anew = runpy.run_path(registry.__file__)
    assert anew["available_optimizers"]() == tuple(name for name in OPTIMIZERS if name not in OPTIONAL)
    for name in anew["available_optimizers"]():
        anew["make_optimizer"](name, [torch.zeros(1, 4, requires_grad=True)], 0.1)


@pytest.mark.parametrize("ask", [default_learning_rate, missing_package, lambda name: make_optimizer(name, [], 0.1)])
def test_an_unknown_optimizer_is_named_with_the_known(ask) -> None:
    with pytest.raises(RequestError, match=r"no optimizer 'Adamm'.*Adam, AdamW"):
        ask("Adamm")


# ---- losses -------------------------------------------------------------------------------------------------------


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    prediction = prediction.clone().requires_grad_(True)
    value = LOSSES[loss](prediction, target)
    value.sum().backward()
    return value.detach(), prediction.grad


@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 4, 6, 5)])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_has_one_value_per_sample(loss, shape) -> None:
    prediction, target = sample(*shape), sample(*shape, seed=1).abs()
    prediction[0] = -target[0].abs()
    value = LOSSES[loss](prediction, target)
    assert value.shape == (3,)
    apart = torch.cat([LOSSES[loss](p[None], t[None]) for p, t in zip(prediction, target, strict=True)])
    torch.testing.assert_close(value, apart)
    assert value[0] > 0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_zero_at_a_match_and_above_it_elsewhere(loss) -> None:
    target = sample(4, 3, 7)
    value, gradient = value_and_gradient(loss, target, target)
    assert value.tolist() == [0.0] * 4
    assert gradient.abs().max() == 0
    for off in (1e-3, 0.05, 0.5, 5.0):
        value, gradient = value_and_gradient(loss, target + off * sample(4, 3, 7, seed=1), target)
        assert (value > 0).all()
        assert torch.isfinite(gradient).all()
        assert (gradient.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("prediction", "target"), [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1e-30, 1.0), (6e4, -6e4)])
def test_a_loss_stays_finite_where_vectors_vanish_or_are_huge(loss, prediction, target) -> None:
    value, gradient = value_and_gradient(loss, torch.full((2, 9), prediction), torch.full((2, 9), target))
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert ((value == 0) == (prediction == target)).all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_measured_in_float32(loss, kind) -> None:
    prediction, target = 300 * sample(2, 9).to(kind), 300 * sample(2, 9, seed=1).to(kind)
    value, gradient = value_and_gradient(loss, prediction, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, LOSSES[loss](prediction.float(), target.float()))
    assert gradient.dtype == kind
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_unequal_shapes_do_not_broadcast(loss) -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        LOSSES[loss](sample(3, 4), sample(1, 4))


def test_the_losses_are_what_they_say() -> None:
    prediction, target = torch.tensor([[0.0, 3.0, 0.05]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert LOSSES["MSE"](prediction, target).item() == pytest.approx((4 + 0.0025) / 3)
    assert LOSSES["L1"](prediction, target).item() == pytest.approx((2 + 0.05) / 3)
    assert LOSSES["SmoothL1"](prediction, target).item() == pytest.approx((1.95 + 0.0125) / 3)
    assert LOSSES["Huber"](prediction, target).item() == pytest.approx((1.5 + 0.00125) / 3)
    a, b = sample(5, 8), sample(5, 8, seed=1)
    torch.testing.assert_close(LOSSES["cosine"](a, b), 1 - F.cosine_similarity(a, b))


def test_cosine_ignores_the_length_and_feels_small_angles() -> None:
    a = sample(1, 3, 50)
    assert LOSSES["cosine"](7 * a, a).item() == pytest.approx(0, abs=1e-12)
    near = a + 1e-5 * sample(1, 3, 50, seed=1)
    exact = 1 - F.cosine_similarity(a.double().flatten(1), near.double().flatten(1))
    assert LOSSES["cosine"](near, a).item() == pytest.approx(exact.item(), rel=0.01)  # 1 - cos would be rounding


def test_no_two_losses_differ_by_a_factor_only() -> None:
    off = torch.tensor([[0.03, -0.02], [0.3, -0.1], [3.0, 0.0]]) + torch.eye(3, 2)
    values = {name: loss(off, torch.eye(3, 2)) for name, loss in LOSSES.items()}
    shapes = {name: tuple((value / value.sum()).round(decimals=3).tolist()) for name, value in values.items()}
    assert len(set(shapes.values())) == len(LOSSES), shapes


# ---- learning rates -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rates"),
    [
        ("0.005", {0: 0.005, 99: 0.005, 10_000: 0.005}),
        (" 5e-3 ", {0: 0.005}),
        ("0.005:-1", {0: 0.005, 999: 0.005, 1000: 0.005}),
        # The webui changes the rate before the update that follows `100` finished ones: the 101st, step 100 from 0.
        ("0.005:100, 1e-3:400, 1e-5", {0: 0.005, 99: 0.005, 100: 1e-3, 399: 1e-3, 400: 1e-5, 9999: 1e-5}),
        ("0.005 : 100 ,1e-3:-1,", {99: 0.005, 100: 1e-3, 999: 1e-3}),
        ("0.005:100, 1e-3:400", {399: 1e-3, 400: 1e-3, 9999: 1e-3}),
        ("0.005:1, 1", {0: 0.005, 1: 1.0}),
        ("0.1:1000, 0.2", {999: 0.1, 1000: 0.2}),
        ("0.1:5000, 0.2:6000, 0.3", {999: 0.1}),
    ],
)
def test_learning_rates_in_the_notation_of_the_webui(text, rates) -> None:
    rate_at = parse_learning_rate(text, steps=1000)
    assert {step: rate_at(step) for step in rates} == rates


@pytest.mark.parametrize(
    ("text", "piece", "why"),
    [
        ("", "", "is empty"),
        (" , ", "", "is empty"),
        ("fast", "'fast'", "no number"),
        ("0.005:100, fast", "'fast'", "no number"),
        (":100", "':100'", "no number"),
        ("0.005:ten", "'0.005:ten'", "no whole number .*'ten'"),
        ("0.005:1e3", "'0.005:1e3'", "no whole number"),
        ("0.005:", "'0.005:'", "no whole number"),
        ("0.005:10:20", "'0.005:10:20'", "no whole number .*'10:20'"),
        ("0", "'0'", "not above zero"),
        ("-0.1", "'-0.1'", "not above zero"),
        ("nan", "'nan'", "not above zero"),
        ("inf:10, 1", "'inf:10'", "not above zero"),
        ("0,005", "'0'", "not above zero"),  # a decimal comma
        ("1,5", "'5'", "never reached"),
        ("0.1, 0.2:100", "'0.2:100'", "never reached"),
        ("0.1:-1, 0.2", "'0.2'", "never reached"),
        ("0.1:0", "'0.1:0'", "counted from 1"),
        ("0.1:-2", "'0.1:-2'", "counted from 1"),
        ("0.1:100, 0.2:100", "'0.2:100'", "the one before it ends at step 100"),
        ("0.1:100, 0.2:50, 0.3", "'0.2:50'", "the one before it ends at step 100"),
    ],
)
def test_a_bad_learning_rate_names_the_piece(text, piece, why) -> None:
    with pytest.raises(RequestError, match=rf"{piece}.*{why}"):
        parse_learning_rate(text, steps=1000)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", {0: 1, 50: 1, 99: 1, 500: 1}),
        ("linear", {0: 1, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0, 500: 0}),
        ("cosine", {0: 1, 25: (1 + math.sqrt(0.5)) / 2, 50: 0.5, 100: 0, 500: 0}),
    ],
)
def test_schedules(schedule, factors) -> None:
    for step, factor in factors.items():
        assert SCHEDULES[schedule](step, 100) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 300])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_starts_at_one_never_rises_and_never_stops_a_run(schedule, steps) -> None:
    factors = [SCHEDULES[schedule](step, steps) for step in range(steps)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] > 0


def test_warm_up_comes_first_and_the_schedule_has_the_rest() -> None:
    rate_at = learning_rate_at("0.1", "linear", 10, 30)
    assert [rate_at(step) for step in (0, 4, 9)] == pytest.approx([0.01, 0.05, 0.1])
    assert [rate_at(step) for step in (10, 15, 20, 29)] == pytest.approx([0.1, 0.075, 0.05, 0.005])


def test_rate_schedule_and_warm_up_multiply() -> None:
    rate_at = learning_rate_at("0.2:4, 0.1", "linear", 2, 12)
    assert [rate_at(step) for step in (0, 1, 2, 3, 4, 11)] == pytest.approx([0.1, 0.2, 0.2, 0.18, 0.08, 0.01])


def test_warm_up_at_its_edges() -> None:
    assert [learning_rate_at(0.1, "cosine", 0, 5)(0), learning_rate_at(0.1, "cosine", 1, 5)(0)] == [0.1, 0.1]
    too_long = learning_rate_at(0.1, "cosine", 20, 10)
    assert [too_long(0), too_long(9)] == pytest.approx([0.005, 0.05])
    assert learning_rate_at(0.1, "cosine", 10, 10)(9) == pytest.approx(0.1)


def test_an_unknown_schedule_is_named_with_the_known() -> None:
    with pytest.raises(RequestError, match=r"no schedule 'step'.*constant, cosine, linear"):
        learning_rate_at("0.1", "step", 0, 10)
