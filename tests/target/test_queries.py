from __future__ import annotations

import torch

from lib_estimate.target.queries import Recorder

SHAPES = [(64, 8), (16, 12), (64, 8)]  # positions and channels of three layers
STEPS = torch.arange(5).repeat_interleave(2)  # of the bank's entries
ORDER = torch.arange(10)


def record(recorder: Recorder, steps: int = 5, batch: int = 2) -> list[list[torch.Tensor]]:
    """Feeds a recorder; returns all that went in, per layer."""
    everything = [[] for _ in SHAPES]
    for step in range(steps):
        for layer, (positions, channels) in enumerate(SHAPES):
            hidden = torch.arange(batch * positions * channels).view(batch, positions, channels) + 10_000.0 * step
            everything[layer].append(hidden)
            recorder.see(step, layer, hidden)
    return everything


def test_it_keeps_some_positions_of_every_latent_and_layer() -> None:
    recorder = Recorder(positions=6, steps=5, budget=2**30, seed=0)
    everything = record(recorder)
    queries = recorder.queries(STEPS, ORDER)
    assert [tuple(h.shape) for h in queries.hidden] == [(10, 6, 8), (10, 6, 12), (10, 6, 8)]
    assert queries.step is STEPS
    assert queries.kept == queries.asked == 6
    for kept, whole in zip(queries.hidden, everything, strict=True):
        rows = {tuple(row) for row in torch.cat(whole).flatten(0, 1).tolist()}
        assert all(tuple(row) in rows for row in kept.flatten(0, 1).tolist())


def test_a_layer_with_fewer_positions_gives_all_it_has() -> None:
    recorder = Recorder(positions=50, steps=5, budget=2**30, seed=0)
    record(recorder)
    assert [h.shape[1] for h in recorder.queries(STEPS, ORDER).hidden] == [50, 16, 50]


def test_the_budget_is_kept_and_said() -> None:
    whole = 5 * 2 * 6 * (8 + 12 + 8) * 4
    recorder = Recorder(positions=6, steps=5, budget=whole // 2, seed=0)
    record(recorder)
    queries = recorder.queries(STEPS, ORDER)
    assert sum(h.nbytes for h in queries.hidden) <= whole // 2
    assert queries.kept == 3 < queries.asked
    assert len({h.shape[1] for h in queries.hidden}) == 1


def test_several_generations_one_after_the_other_are_cut_alike() -> None:
    """Also where a layer has fewer positions than are kept of the others, so that less than expected is saved there."""
    budget = 2 * 5 * 2 * (20 * 8 + 16 * 12 + 20 * 8) * 4
    recorder = Recorder(positions=50, steps=10, budget=budget, seed=0)
    record(recorder), record(recorder)
    queries = recorder.queries(STEPS.repeat(2), torch.arange(20))
    assert [tuple(h.shape) for h in queries.hidden] == [(20, 20, 8), (20, 16, 12), (20, 20, 8)]
    assert queries.kept == 20


def test_a_seed_repeats_the_choice() -> None:
    picked = []
    for seed in (1, 1, 2):
        recorder = Recorder(positions=4, steps=5, budget=2**30, seed=seed)
        record(recorder)
        picked.append(recorder.queries(STEPS, ORDER).hidden[0])
    assert torch.equal(picked[0], picked[1])
    assert not torch.equal(picked[0], picked[2])


def test_they_come_in_the_order_of_the_bank() -> None:
    given, turned = (Recorder(positions=6, steps=5, budget=2**30, seed=0) for _ in range(2))
    record(given), record(turned)
    for a, b in zip(given.queries(STEPS, ORDER).hidden, turned.queries(STEPS, ORDER.flip(0)).hidden, strict=True):
        assert torch.equal(a.flip(0), b)
        assert not torch.equal(a, b)
