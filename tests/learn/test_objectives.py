"""Every objective: gradients that are real, a loss that learning lowers, and nothing else that changes."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib_estimate.errors import RequestError
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import Conditioning, Sensitivity
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.objectives import sketch
from lib_estimate.learn.objectives.base import Together, in_sentences
from lib_estimate.learn.objectives.cross_attention import CrossAttention, InSentences
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.learn.objectives.sketch import Layer, Sketch, Sketched, SketchInSentences, sketched
from lib_estimate.learn.registry import LOSSES
from lib_estimate.target.sentences import distinct
from tests.conftest import all_parameters, record

SENTENCES = ("in sentences", "sketch in sentences")
PARTS = ("transformer", "unet", "cross-attention", "sketch", *SENTENCES, "together")


def make(part: str, session, request, loss: str = "MSE"):
    distance, material = LOSSES[loss], record(session, request)
    if part == "transformer":
        return HiddenState(session, material.target, distance)
    if part == "unet":
        return Denoising(session, material.target, material.bank, material.checks, distance, batch=4, fixed=12)
    if part == "cross-attention":
        return CrossAttention(session, material.target, material.queries, distance)
    if part == "in sentences":
        return InSentences(session, material.target, material.queries, distance, request.prompt, ())
    if part == "sketch":
        return Sketch(session, material.target, sketch_of(session, material))
    if part == "sketch in sentences":
        return SketchInSentences(session, material.target, sketch_of(session, material), request.prompt, ())
    other = record(session, request, "a photo of {}, large")
    pair = [CrossAttention(session, m.target, m.queries, distance) for m in (material, other)]
    return Together(pair)


def sketch_of(session, material, budget: float = 2**30) -> Sketched:
    """Of every other latent, which is enough to learn something."""
    bank = material.bank
    given = [material.target.wanted(step)[0][1] for step in bank.step[::2].tolist()]
    *done, recorded = sketched(session, given, bank.x[::2], bank.timestep[::2], budget, seed=0)
    assert done == list(range(1, len(given) + 1))
    return recorded


def learn(objective, vectors: torch.Tensor, steps: int = 12) -> list[float]:
    """Losses of a few Adam steps on the same entries; the start's first."""
    vectors = vectors.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([vectors], lr=0.01)
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=True)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = objective.loss({"clip_l": vectors}, drawn)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def lowers(objective, session, request) -> bool:
    losses = learn(objective, initial_vectors(dataclasses.replace(request, init="a blue star"), session)["clip_l"])
    return losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("part", ["transformer", "unet", "cross-attention"])
@pytest.mark.parametrize("loss", LOSSES)
def test_learning_lowers_the_loss(part, loss, session, short) -> None:
    assert lowers(make(part, session, short, loss), session, short)


@pytest.mark.parametrize("part", ["sketch", *SENTENCES])
def test_learning_lowers_the_losses_that_have_one_distance(part, session, short) -> None:
    assert lowers(make(part, session, short), session, short)


@pytest.mark.parametrize("part", PARTS)
def test_a_cut_gradient_path_would_be_noticed(part, session, short, monkeypatch) -> None:
    """The test above fails when the vectors no longer reach the loss."""
    objective = make(part, session, short)
    encode = session.encode

    def cut(texts, vectors=None, **options):
        hidden = encode(texts, vectors, **options).hidden
        return Conditioning(hidden.detach().requires_grad_(True))

    monkeypatch.setattr(session, "encode", cut)
    assert not lowers(objective, session, short)


@pytest.mark.parametrize("part", PARTS)
def test_gradients_are_those_of_finite_differences(part, session, short) -> None:
    objective = make(part, session, short)
    start = initial_vectors(dataclasses.replace(short, init="a blue star"), session)["clip_l"]
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=True)
    leaf = start.clone().requires_grad_(True)
    objective.loss({"clip_l": leaf}, drawn).backward()
    way = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    way /= way.norm()
    with torch.no_grad():
        ahead, behind = (objective.loss({"clip_l": start + h * way}, drawn) for h in (1e-2, -1e-2))
    measured, computed = ((ahead - behind) / 2e-2).item(), (leaf.grad * way).sum().item()
    assert measured == pytest.approx(computed, rel=0.05, abs=1e-3)
    assert abs(computed) > 1e-3


@pytest.mark.parametrize("part", PARTS)
def test_the_loss_is_near_zero_at_a_match(part, session, short) -> None:
    """With a prompt that has no weights its own token vectors are a perfect match."""
    request = dataclasses.replace(short, prompt="a red circle")
    objective = make(part, session, request)
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=True)
    with torch.no_grad():
        match = objective.loss(initial_vectors(request, session), drawn)
        far = objective.loss(initial_vectors(dataclasses.replace(request, init="red blue star"), session), drawn)
    assert match < 1e-5
    assert far > 0.05


@pytest.mark.parametrize("part", ["transformer", "cross-attention", "sketch"])
def test_the_loss_is_one_at_the_empty_prompt(part, session, short) -> None:
    objective = make(part, session, short)
    objective.target = dataclasses.replace(objective.target, frame="", negative=False)
    with torch.no_grad():
        object.__setattr__(objective.target, "embed", lambda *_: objective.target.empty)
        assert objective.loss({}, None).item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("part", SENTENCES)
def test_in_sentences_the_plain_prompt_has_a_loss_of_one(part, session, short) -> None:
    objective = make(part, session, short)
    objective.FLOOR = 0.0
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=False)
    with torch.no_grad():
        shares = objective.shares(session.token_vectors("a red circle"), drawn)
    assert len(shares) == 1 + objective.FRESH
    assert torch.allclose(shares, torch.ones_like(shares), rtol=1e-3), shares


def test_the_sketch_tells_what_a_small_change_does_to_the_predicted_noise(session, short) -> None:
    """Its sums are those of probe times eps, for a change of the conditioning that is small enough to be linear."""
    material = record(session, short)
    bank, target = material.bank, material.target
    wanted, at = target.single(), slice(3, 4)
    probe = torch.randn(bank.x[at].shape, generator=torch.Generator().manual_seed(1))
    seen = session.sensitivity(bank.x[at], bank.timestep[at], wanted, probe)
    change = 1e-3 * torch.randn(wanted.hidden.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        eps = [
            session.predict_noise(bank.x[at], bank.timestep[at], Conditioning(wanted.hidden + s * change))
            for s in (1, -1)
        ]
        layers = session.cross_attention()
        moved = [
            (layer(hidden, wanted.hidden + change) - layer(hidden, wanted.hidden - change)) * gradient
            for layer, hidden, gradient in zip(layers, seen.hidden, seen.gradient, strict=True)
        ]
    # Each layer's queries stay as they were under the target, and what they change downstream is in the gradients.
    assert sum(m.sum() for m in moved).item() == pytest.approx(((eps[0] - eps[1]) * probe).sum().item(), rel=0.02)


def test_the_sketch_keeps_what_fits_and_the_same_places_of_every_layer(session, short) -> None:
    material = record(session, short)
    whole, few = (sketch_of(session, material, budget) for budget in (2**30, 2**17))
    cells = [[len(layer.hidden[0]) // layer.side**2 for layer in recorded.layers] for recorded in (whole, few)]
    assert len(set(cells[0])) == len(set(cells[1])) == 1
    assert cells[1][0] < cells[0][0]
    stored = sum(layer.hidden.nbytes + layer.gradient.nbytes for layer in few.layers)
    assert stored <= 2**17 or cells[1][0] == 1
    assert {layer.side for layer in whole.layers} == {1, 2}


def test_the_sketchs_sums_are_the_predicted_noise_of_a_small_change(session, short, monkeypatch) -> None:
    """Over all positions, coarse layers' shared out; with one layer's left out they are not."""
    monkeypatch.setattr(sketch, "MOST_CELLS", 1.0)
    material = record(session, short)
    bank, wanted = material.bank, material.target.single()
    x, timestep = bank.x[3:4], bank.timestep[3:4]
    *_, recorded = sketched(session, [wanted], x, timestep, 2**30, seed=5)
    probe = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    change = 1e-3 * torch.randn(wanted.hidden.shape, generator=torch.Generator().manual_seed(2))
    moved = Conditioning(wanted.hidden + change)

    def told(recorded: Sketched) -> float:
        made = Sketch(session, material.target, recorded)
        return sum((e - w).sum().item() for e, w in zip(made._sums(moved), made.wanted, strict=True))

    with torch.no_grad():
        eps = [session.predict_noise(x, timestep, given) for given in (moved, wanted)]
        truth = ((eps[0] - eps[1]) * probe).sum().item()
        assert told(recorded) == pytest.approx(truth, rel=0.05)
        first, *others = recorded.layers
        none = dataclasses.replace(first, gradient=torch.zeros_like(first.gradient))
        assert told(Sketched([none, *others], None, recorded.given)) != pytest.approx(truth, rel=0.05)


def test_a_cell_has_the_same_place_in_every_layer_also_at_the_edges(monkeypatch) -> None:
    """Latents of 5 x 7: the coarse layer has 3 x 4 positions, and its last ones reach over the edge."""
    monkeypatch.setattr(sketch, "MOST_CELLS", 1.0)
    sides = ((5, 7), (3, 4))
    places = [torch.cartesian_prod(torch.arange(h), torch.arange(w))[None].float() for h, w in sides]
    seen = Sensitivity(places, [p + 100 for p in places], None, torch.zeros(1))
    fine, coarse = sketch._cells(seen, (5, 7), 2**30, torch.Generator().manual_seed(0))
    assert (fine.side, coarse.side) == (2, 1)
    cells = coarse.hidden[0].tolist()
    assert sorted(cells) == places[1][0].tolist()
    inside = [[min(2 * y + dy, 4), min(2 * x + dx, 6)] for y, x in cells for dy in (0, 1) for dx in (0, 1)]
    assert fine.hidden[0].tolist() == inside
    assert torch.equal(fine.gradient, fine.hidden + 100)
    half = sum(h.nbytes + g.nbytes for h, g in zip(seen.hidden, seen.gradient, strict=True)) / 2
    assert len(sketch._cells(seen, (5, 7), half, torch.Generator())[1].hidden[0]) == 6


def test_what_the_pooled_vector_does_is_one_number_for_each_latent() -> None:
    nothing, gradients = torch.zeros(2, 1, 3), torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 5.0]])
    objective = object.__new__(Sketch)
    objective.recorded = Sketched([Layer(nothing, nothing, 1)], gradients, [])
    objective.calls = [lambda hidden, _: hidden]
    *_, sums = objective._sums(Conditioning(nothing[:1], torch.tensor([[1.0, 10.0, 100.0]])))
    assert sums.tolist() == [21.0, 510.0]


def test_a_point_of_the_finest_grid_is_found_in_every_layer() -> None:
    """Two latents of three cells: the hidden states say where they are, as latent, cell, row and column."""

    def layer(side: int) -> Layer:
        at = torch.cartesian_prod(*map(torch.arange, (2, 3, side, side))).float().view(2, 3 * side**2, 4)
        return Layer(at, torch.ones_like(at), side)

    objective = object.__new__(SketchInSentences)
    objective.recorded = Sketched([layer(4), layer(2), layer(1)], None, [])
    points = torch.cartesian_prod(*map(torch.arange, (2, 3, 4, 4)))
    levels = torch.tensor([1.0, 10.0])
    objective.points = len(points)
    for layer, covers in zip(objective.recorded.layers, (1, 2, 4), strict=True):
        hidden, gradient = objective._rows(layer, torch.arange(len(points)), levels)
        assert torch.equal(hidden, points // torch.tensor([1, 1, covers, covers]).float())
        assert torch.equal(gradient[:, 0], levels[points[:, 0]] / covers)


def test_each_latent_counts_by_what_the_weights_change_there(session, short, monkeypatch) -> None:
    for name, value in {"LEVEL_FLOOR": 0.0, "LEVEL_POINTS": 10**6}.items():
        monkeypatch.setattr(SketchInSentences, name, value)
    objective = make("sketch in sentences", session, short)
    count = len(objective.levels)
    assert objective.points % count == 0
    _, wanted, plain = in_sentences(session, short.prompt, ["{}"])
    every = torch.arange(objective.points)
    for floor, other in ((0.0, plain), (1e12, objective.target.empty)):  # beyond its floor what an empty prompt changes
        objective.FLOOR = floor
        with torch.no_grad():
            levels = objective._levels(count)
            rows = [objective._rows(layer, every, levels) for layer in objective.recorded.layers]
            pairs = zip(objective._sums(rows, wanted), objective._sums(rows, other), strict=True)
            changed = sum((a - b)[0].square().view(count, -1).mean(1) for a, b in pairs)
        assert (changed > 0).all()
        assert torch.allclose(changed, changed[:1].expand(count), rtol=1e-3)
    assert objective.levels.max() > 1.5 * objective.levels.min()
    objective.FLOOR, objective.LEVEL_FLOOR = 0.0, 1e4
    assert torch.allclose(objective._levels(count), torch.ones(count), rtol=1e-2)


def test_in_sentences_only_the_prompts_own_weights_are_left_out(session) -> None:
    frames, wanted, plain = in_sentences(session, "a (red:1.5) circle", ["a (large:1.3) {}"])
    assert frames == [f"a (large:1.3) {session.placeholder}"]
    assert torch.equal(wanted.hidden, session.encode(["a (large:1.3) a (red:1.5) circle"]).hidden)
    assert torch.allclose(plain.hidden, session.encode(["a (large:1.3) a red circle"]).hidden, atol=1e-5)


def test_one_latent_at_a_time_is_the_same_loss(session, short) -> None:
    objective = make("unet", session, short)
    drawn, start = objective.draw(torch.Generator().manual_seed(0), fixed=True), session.token_vectors("a blue square")

    def loss() -> tuple[float, torch.Tensor, list[int]]:
        seen, predict = [], session.predict_noise
        session.predict_noise = lambda x, *given: (seen.append(len(x)), predict(x, *given))[1]
        vectors = {key: rows.clone().requires_grad_(True) for key, rows in start.items()}
        try:
            value = objective.loss(vectors, drawn)
        finally:
            del session.predict_noise
        (gradient,) = torch.autograd.grad(value, list(vectors.values()))
        return value.item(), gradient, seen

    whole, gradient, together = loss()
    assert objective.lighten()
    pieces, same, apart = loss()
    assert together == [sum(apart)]
    assert set(apart) == {1}
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(same, gradient, rtol=1e-3, atol=1e-6)


def test_latents_too_large_to_go_together_are_lightened_by_computing_activations_again(
    session, short, monkeypatch
) -> None:
    saved = []
    monkeypatch.setattr(session, "save_memory", lambda: not saved.append(1))
    monkeypatch.setattr(Denoising, "PIXELS_AT_ONCE", 1)
    assert make("unet", session, short).lighten()
    assert saved


class ReadBack(TorchDispatchMode):
    """Counts values that Python takes out of tensors: on a GPU it would wait there for all work given out so far."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("part", PARTS)
def test_a_loss_and_its_gradient_read_nothing_back(part, session, short) -> None:
    objective = make(part, session, short)
    vectors = {key: rows.clone().requires_grad_(True) for key, rows in session.token_vectors("a blue square").items()}
    drawn = objective.draw(torch.Generator().manual_seed(0), fixed=False)
    with ReadBack() as reads:
        loss = objective.loss(vectors, drawn)
        loss.backward()
    assert reads.count == 0
    with reads:
        loss.item()
    assert reads.count == 1


@pytest.mark.parametrize("part", SENTENCES)
def test_sentences_are_fresh_at_every_step_and_never_those_to_avoid(part, session, short) -> None:
    objective = make(part, session, short)
    generator = torch.Generator().manual_seed(0)
    first, second = (objective.draw(generator, fixed=False)[0] for _ in range(2))
    assert first[0] == second[0] == session.placeholder
    assert set(first[1:]).isdisjoint(second[1:])
    known = distinct(Random(0), objective.FIXED, (), session.random_text)
    objective.avoid = set(known)
    drawn = objective.draw(generator, fixed=True)[0]
    assert set(drawn).isdisjoint(s.replace("{}", session.placeholder) for s in known)


def test_cross_attention_is_the_unets_own(session, short) -> None:
    """The layers called with what entered them give what they gave while sampling."""
    seen, gave = {}, {}
    modules = denoising.attention_modules(session.parts.unet)
    handles = [m.register_forward_hook(lambda _, a, out, i=i: gave.setdefault(i, out)) for i, m in enumerate(modules)]
    target = record(session, dataclasses.replace(short, sampling_steps=2)).target
    for handle in handles:
        handle.remove()
    gave.clear()
    handles = [m.register_forward_hook(lambda _, a, out, i=i: gave.update({i: out})) for i, m in enumerate(modules)]
    noise = torch.randn(1, session.info.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    watch = denoising.watching(session.parts.unet, lambda step, layer, hidden: seen.update({layer: hidden}), 0)
    with watch, torch.no_grad():
        session.predict_noise(noise, torch.tensor([500]), target.single())
    for handle in handles:
        handle.remove()
    assert len(seen) == len(modules) > 3
    with torch.no_grad():
        for index, layer in enumerate(session.cross_attention()):
            assert torch.allclose(layer(seen[index], target.single().hidden), gave[index], atol=1e-5)
    assert not any(m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("part", PARTS)
def test_weights_stay_bit_equal(part, host, session, short) -> None:
    before = all_parameters(host)
    learn(make(part, session, short), initial_vectors(short, session)["clip_l"], steps=2)
    assert all(torch.equal(a, b) for a, b in zip(before, all_parameters(host), strict=True))
    assert all(p.grad is None for p in host.parts.unet.parameters())
    assert all(p.grad is None for p in host.parts.text_encoders[0].model.parameters())


def test_steps_see_all_noise_levels(session, short) -> None:
    objective = make("unet", session, dataclasses.replace(short, trajectories=2))
    entries = objective.draw(torch.Generator().manual_seed(3), fixed=False)
    stretch = len(objective.bank) // len(entries)
    assert (entries // stretch).tolist() == list(range(len(entries)))
    fixed = [objective.draw(torch.Generator(), fixed=True).tolist() for _ in range(2)]
    assert fixed[0] == fixed[1]


@pytest.mark.parametrize("prompt", ["a [red:blue:0.5] circle", "a circle AND a star", "a circle BREAK a star"])
def test_what_hidden_states_cannot_express_is_refused(prompt, session, short) -> None:
    with pytest.raises(RequestError, match="unet part"):
        make("transformer", session, dataclasses.replace(short, prompt=prompt))


def test_cross_attention_refuses_a_composition(session, short) -> None:
    with pytest.raises(RequestError, match="AND"):
        make("cross-attention", session, dataclasses.replace(short, prompt="a circle AND a star"))


@pytest.mark.parametrize("part", ["cross-attention", "sketch"])
@pytest.mark.parametrize("prompt", ["a [red:(blue:1.4):0.5] circle", "a (red:1.4) circle BREAK a star"])
def test_what_changes_and_what_is_long_can_be_followed(part, prompt, session, short) -> None:
    assert lowers(make(part, session, dataclasses.replace(short, prompt=prompt)), session, short)


@pytest.mark.parametrize("prompt", ["a [red:blue:0.5] circle", "a circle AND a star"])
def test_only_steady_prompts_can_be_learnt_for_anywhere(prompt, session, short) -> None:
    with pytest.raises(RequestError, match="whole"):
        make("in sentences", session, dataclasses.replace(short, prompt=prompt))
