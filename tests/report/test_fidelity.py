"""The report: what its numbers count, and what it does about vectors that do worse than leaving the weights out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate import job
from lib_estimate.hosts import denoising
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.progress import Note
from lib_estimate.report.fidelity import (
    Court,
    ErrorThere,
    Fidelity,
    measure,
    median_and_worst,
    picture_error,
    picture_errors,
    report_sentences,
)
from lib_estimate.report.in_words import result_sentence
from lib_estimate.request import HOLE, EstimateRequest, Part, Use
from lib_estimate.request import Target as Which
from lib_estimate.target.bank import HELD_OUT, bank_of, build_bank, latent_noise
from lib_estimate.target.error import share_of_empty
from lib_estimate.target.target import build_target
from tests.bench.measure import counting
from tests.conftest import run


def reported(session, request, vectors, chosen=()):
    *_, fidelity = measure(session, build_target(request, session), request, [lambda: vectors], chosen)
    return fidelity


def test_the_prompts_own_conditioning_has_no_error_and_leaving_the_weights_out_all_of_it(session, short) -> None:
    request = dataclasses.replace(short, images=1)
    plain = reported(session, request, session.token_vectors("a red circle"), ("a photo of {}",))
    assert plain.picture_error == pytest.approx(1, rel=1e-3)
    assert plain.error == pytest.approx(plain.unweighted_error, rel=1e-3)
    assert plain.recovered == pytest.approx(0, abs=1e-3)
    assert plain.sentences[0].share == pytest.approx(1, rel=1e-3)
    same = reported(session, dataclasses.replace(request, prompt="a red circle"), session.token_vectors("a red circle"))
    assert (same.reference, same.recovered, same.unweighted_error) == ("empty", None, None)
    assert same.error < 1e-6
    assert same.picture_error < 1e-3
    assert set(same.pictures) == {"prompt", "embedding", "empty"}


def test_a_flipped_picture_is_seen_among_the_others() -> None:
    wanted, reference = torch.zeros(3, 4, 2, 2), torch.ones(3, 4, 2, 2)
    given = torch.stack([torch.full((4, 2, 2), x) for x in (0.1, 0.1, 1.0)])
    wanted += 1e-3
    each = picture_errors(given, wanted, reference)
    assert each.tolist() == pytest.approx([0.01, 0.01, 1.0], rel=0.05)
    assert picture_error(given, wanted, reference) == pytest.approx(each.log().mean().exp().item())


@pytest.mark.parametrize(
    ("changes", "below"),
    [
        ({}, False),
        ({"recovered": -0.1}, True),
        ({"error": 0.3}, True),
        ({"picture_error": 1.1}, True),
        ({"picture_error": None, "unweighted_error": None, "recovered": None}, False),
        ({"reference": "empty", "picture_error": 1.1}, False),
    ],
)
def test_one_way_of_counting_is_enough_to_be_worse_than_no_weights(changes, below) -> None:
    good = Fidelity(0.5, "unweighted", 0.1, 0.2, 0.5, (), None, None, {})
    assert dataclasses.replace(good, **changes).below_plain() is below


@pytest.mark.parametrize(
    ("error", "unweighted", "share", "worse"),
    [
        (0.1, 0.2, 0.9, False),
        (0.3, 0.2, 0.9, True),
        (0.1, 0.2, 1.1, True),
        (0.3, None, 0.9, False),
        (9.0, 0.2, None, False),
    ],
)
def test_so_it_is_in_a_sentence(error, unweighted, share, worse) -> None:
    assert ErrorThere("a {}", error, unweighted, share, True).worse() is worse


def test_of_several_places_the_median_and_the_worst_are_told() -> None:
    rows = [(0.1, 0.4, True), (0.2, None, True), (0.3, 0.9, True), (0.9, 5.0, False)]
    there = [ErrorThere("", error, None, share, fitted) for error, share, fitted in rows]
    assert median_and_worst(there, fitted=True) == {"median": 0.4, "worst": 0.9}
    assert median_and_worst(there, fitted=False) == {"median": 5.0, "worst": 5.0}
    assert median_and_worst(there[:3], fitted=False) is None


def test_a_report_has_six_sentences_besides_those_learnt_from() -> None:
    request = EstimateRequest(prompt="(red:1.5)", negative="(blue:1.5)", name="x")
    drawn = report_sentences(request)
    assert len(set(drawn)) == 6
    assert HOLE not in drawn
    assert all(sentence.count(HOLE) == 1 for sentence in drawn)
    assert drawn == report_sentences(request) != report_sentences(dataclasses.replace(request, seed=1))
    given = dataclasses.replace(request, sentence=("a house of {}",))
    assert report_sentences(given) == given.sentence
    assert report_sentences(dataclasses.replace(given, use=Use.SENTENCE)) == (*given.sentence, *drawn)
    assert report_sentences(dataclasses.replace(request, take_over_lora=True)) == ()
    negative = dataclasses.replace(request, target=Which.NEGATIVE)
    assert report_sentences(negative) == drawn
    assert report_sentences(dataclasses.replace(negative, use=Use.WHOLE)) == ()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_are_what_each_step_moves_sigma_by(session, short, monkeypatch, prediction) -> None:
    """So they add up to the way from the first sigma to the last, whatever the network predicts."""
    abar = session.parts.alphas_cumprod.float()
    monkeypatch.setattr(session, "levels", denoising.Levels(abar, prediction == "v_prediction"))
    target = build_target(short, session)
    noise = latent_noise(short, session, HELD_OUT, 1)
    *_, path = session.sample(noise, target.guidance, 5.0)
    sigmas = denoising.sigma(session.parts.alphas_cumprod.float())
    apart = len(sigmas) // len(target.guidance)
    last = sigmas[max(int(path.timestep[-1]) - apart, 0)]
    assert path.dsigma.sum().item() == pytest.approx((sigmas[path.timestep[0]] - last).item(), rel=1e-4)
    assert (path.dsigma >= 0).all()
    few = bank_of(session, target, path, range(8), 5.0, levels=4)
    every = bank_of(session, target, path, range(8), 5.0)
    assert few.weight.sum().item() == pytest.approx(every.weight.sum().item())
    assert (len(few), len(every)) == (4, 8)


def test_to_first_order_the_weighted_error_is_the_finished_latents(session, short) -> None:
    """A change of eps at one step moves the finished latents by dsigma times it where nothing later answers to it."""
    target = build_target(short, session)
    noise = latent_noise(short, session, HELD_OUT, 1)
    *_, bank = build_bank(session, target, noise, 1.0)
    eps = bank.target.clone()
    eps[2] += 0.01
    high = share_of_empty(eps, bank, weighted=True)
    eps = bank.target.clone()
    eps[-1] += 0.01
    low = share_of_empty(eps, bank, weighted=True)
    assert high / low == pytest.approx((bank.weight[2] / bank.weight[-1]).item(), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "learning", "report"),
    [({"use": Use.WHOLE, "vectors": 4}, 400, 400), ({"use": Use.ANYWHERE, "steps": 4}, 300, 400)],
)
def test_a_default_estimate_costs_ten_pictures_and_says_what_it_cost(host, tmp_path, changes, learning, report) -> None:
    """The record's count is that of the networks themselves, hooked from outside."""
    samples = {"forwards": 0, "backwards": 0}

    def forward(_, args, kwargs, out) -> None:
        samples["forwards"] += len(args[0])
        if out[0].requires_grad:
            out[0].register_hook(lambda gradient: samples.update(backwards=samples["backwards"] + len(gradient)))

    handle = host.parts.unet.register_forward_hook(forward, with_kwargs=True)
    try:
        made = EstimateRequest(prompt="(red:1.6) circle", name="cost", out=str(tmp_path), **changes)
        outcome = run(made, host)
    finally:
        handle.remove()
    counted = outcome.record["forwards"]
    assert sum(counted.values()) == samples["forwards"] + 2 * samples["backwards"]
    assert counted["recording"] + counted["learning"] <= learning, counted
    assert counted["report"] <= report, counted
    assert outcome.embedding.metadata["forwards"] == counted


def test_a_prompt_whose_own_tokens_are_exact_is_saved_at_once(host, short) -> None:
    request = dataclasses.replace(short, prompt="a red circle", part=Part.AUTO, steps=0, images=2, use=Use.ANYWHERE)
    *seen, outcome = job.estimate(request, host)
    assert any(isinstance(p, Note) and "exact" in p.text for p in seen)
    assert sum(outcome.record["forwards"].values()) == 0
    with host.session() as session:
        own = session.token_vectors("a red circle")["clip_l"]
    assert torch.equal(outcome.embedding.vectors["clip_l"], own)
    learnt = run(dataclasses.replace(request, vectors=5, overwrite=True, steps=2), host)
    assert sum(learnt.record["forwards"].values()) > 0, "more vectors move the words after them"


def test_what_does_worse_than_leaving_the_weights_out_is_not_handed_out(host, short, monkeypatch) -> None:
    """A learning rate that throws the vectors far away: the start is kept, which is the prompt without its weights."""
    far = dataclasses.replace(
        short, part=Part.CROSS_ATTENTION, use=Use.ANYWHERE, optimizer="Adam", learning_rate="0.5", steps=3, images=1
    )
    monkeypatch.setattr("lib_estimate.learn.fit.Fit._check", lambda self, vectors: self._keep(vectors), raising=False)
    monkeypatch.setattr(
        "lib_estimate.learn.fit.Fit._keep",
        lambda self, vectors: self.__dict__.update(best={k: r.clone() for k, r in vectors.items()}) or 0.0,
        raising=False,
    )
    *seen, outcome = job.estimate(far, host)
    notes = [p.text for p in seen if isinstance(p, Note)]
    assert job.STAYED.format("leaving the weights out") in notes, notes
    with host.session() as session:
        start = initial_vectors(far, session)["clip_l"]
    assert torch.equal(outcome.embedding.vectors["clip_l"], start)
    assert outcome.fidelity.picture_error == pytest.approx(1, abs=1e-3)


def test_a_candidate_that_fails_is_given_up_without_pictures(session, short) -> None:
    request = dataclasses.replace(short, images=1, use=Use.ANYWHERE)
    target = build_target(request, session)
    court = Court(session, target, request, ("a photo of {}",))
    list(court.prepare())
    bad = session.token_vectors("a blue star")
    with counting(session) as count:
        outcome = []
        generator = court.judge(bad, pictures_anyway=False)
        try:
            while True:
                next(generator)
        except StopIteration as end:
            outcome.append(end.value)
    assert outcome == [None]
    assert count.forwards <= len(court.bank) + 2 * 4


def test_words_say_what_is_left_and_where_it_carries_little(session, short) -> None:
    request = dataclasses.replace(short, images=2)
    fidelity = reported(session, request, session.token_vectors("a red circle"), ("a photo of {}",))
    said = result_sentence(fidelity, "word")
    assert "100% is left" in said
    assert "picture by picture 100%, 100%" in said
    assert "carries little" in said
