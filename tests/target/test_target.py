from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import ModelError, RequestError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.base import compose
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import EstimateRequest
from lib_estimate.request import Target as Which
from lib_estimate.target.bank import (
    HELD_OUT,
    PICTURES,
    TRAIN,
    VALIDATION,
    bank_of,
    build_bank,
    latent_noise,
    noise_under,
    without_networks,
)
from lib_estimate.target.recording import CHECKS, LEARNT_FROM
from lib_estimate.target.target import build_target, own_text, taken_over
from tests.conftest import record


def small_bank(session, request):
    material = record(session, request)
    return material.target, material.bank


def with_prompt(short, prompt: str, **change):
    return dataclasses.replace(short, prompt=prompt, **change)


def test_entries_hold_what_the_unet_says_under_the_prompt(session, short) -> None:
    target, bank = small_bank(session, short)
    wanted = session.encode([short.prompt])
    assert torch.allclose(bank.target, noise_under(session, bank.x, bank.timestep, wanted), atol=1e-4)
    assert torch.allclose(bank.empty, noise_under(session, bank.x, bank.timestep, session.encode([""])), atol=1e-4)
    plain = session.encode(["a red circle"])
    assert torch.allclose(bank.plain, noise_under(session, bank.x, bank.timestep, plain), atol=1e-4)
    assert len(bank) == short.sampling_steps
    assert (bank.timestep.diff() < 0).all()


def test_a_prompt_without_weights_has_no_plain_one(session, short) -> None:
    target, bank = small_bank(session, with_prompt(short, "a red circle"))
    assert target.plain is None
    assert bank.plain is None


def test_an_edited_prompt_changes_the_target_at_its_step(session, short) -> None:
    request = with_prompt(short, "a [red:(blue:1.4):0.5] circle")
    target, bank = small_bank(session, request)
    first = noise_under(session, bank.x[:4], bank.timestep[:4], session.encode(["a red circle"]))
    assert torch.allclose(bank.target[:4], first, atol=2e-3)  # encoded with its schedule, so nearly but not quite
    under_red = noise_under(session, bank.x[4:], bank.timestep[4:], session.encode(["a red circle"]))
    assert not torch.allclose(bank.target[4:], under_red, atol=2e-3)
    assert target.single() is None


def test_a_composed_prompt_is_one_eps(session, short) -> None:
    target, bank = small_bank(session, with_prompt(short, "a red circle AND a blue square :0.5"))
    eps = [noise_under(session, bank.x, bank.timestep, session.encode([t])) for t in ("a red circle", " a blue square")]
    negative = noise_under(session, bank.x, bank.timestep, session.encode([""]))
    assert torch.allclose(bank.target, compose([(1.0, eps[0]), (0.5, eps[1])], negative), atol=1e-4)
    assert target.single() is None


def test_a_long_prompt_has_several_chunks(session, short) -> None:
    target, bank = small_bank(session, with_prompt(short, "a red circle BREAK on a (blue:1.3) background"))
    assert target.single().hidden.shape[1] == 2 * target.empty.hidden.shape[1]
    assert torch.isfinite(bank.target).all()


def test_a_negative_prompt_is_matched_on_the_negative_side(session, short) -> None:
    request = dataclasses.replace(short, prompt="a circle", negative="(red:1.5)", target=Which.NEGATIVE)
    target, bank = small_bank(session, request)
    wanted = session.encode(["(red:1.5)"])
    assert torch.allclose(bank.target, noise_under(session, bank.x, bank.timestep, wanted), atol=1e-4)
    embedding = session.encode(["a star"])
    assert all(s.negative is embedding for s in target.with_embedding(embedding))
    assert target.plain is not None


def test_a_composition_whose_weights_differ_per_step_matches_its_own_plain(session, short) -> None:
    request = with_prompt(short, "a (red:1.5) circle AND a [blue:green:0.5] square")
    target, bank = small_bank(session, request)
    same = with_prompt(short, "a red circle AND a [blue:green:0.5] square")
    guidance = build_target(same, session).guidance
    for step in (0, short.sampling_steps - 1):
        x, t = bank.x[step : step + 1], bank.timestep[step : step + 1]
        negative = noise_under(session, x, t, guidance[step].negative)
        want = compose([(w, noise_under(session, x, t, c)) for w, c in guidance[step].positive], negative)
        assert torch.allclose(bank.plain[step : step + 1], want, atol=1e-4)


def test_parts_of_the_bank_have_noise_of_their_own(session, short) -> None:
    request = dataclasses.replace(short, trajectories=3)
    regions = (TRAIN, VALIDATION, HELD_OUT, PICTURES)
    noise = torch.cat([latent_noise(request, session, region, 3) for region in regions])
    again = torch.cat([latent_noise(request, session, region, 3) for region in regions])
    assert torch.equal(noise, again)
    assert len({row.sum().item() for row in noise}) == 12
    other = latent_noise(dataclasses.replace(request, seed=1), session, TRAIN, 3)
    assert not torch.equal(noise[:3], other)


@pytest.mark.parametrize(("width", "height"), [(0, 0), (64, 192)])
def test_latents_have_the_asked_size(session, short, width, height) -> None:
    request = dataclasses.replace(short, width=width, height=height)
    info = session.info
    noise = latent_noise(request, session, TRAIN, 1)
    wanted = [(side or info.default_size) // info.latent_scale for side in (height, width)]
    assert list(noise.shape) == [1, info.latent_channels, *wanted]


def test_in_a_sentence_only_the_prompts_own_weights_are_left_out(session, short) -> None:
    target = build_target(short, session, "a (large:1.3) {} on the left")
    assert torch.equal(
        target.wanted(0)[0][1].hidden, session.encode(["a (large:1.3) a (red:1.6) circle on the left"]).hidden
    )
    plain = session.encode(["a (large:1.3) a red circle on the left"]).hidden
    assert torch.allclose(target.plain[0].positive[0][1].hidden, plain, atol=1e-5)
    rows = session.token_vectors("a red circle")
    assert torch.allclose(target.embed(session, rows).hidden, plain, atol=1e-5)


def test_in_a_sentence_a_composition_stays_one_without_its_weights(session, short) -> None:
    target = build_target(with_prompt(short, "a (red:1.4) circle AND a star"), session, "a photo of {}")
    red, star = (conditioning.hidden for _, conditioning in target.plain[0].positive)
    assert torch.allclose(red, session.encode(["a photo of a red circle"]).hidden, atol=1e-5)
    assert torch.allclose(star, session.encode([" a star"]).hidden, atol=1e-5)


def test_a_sentence_that_changes_is_refused(session, short) -> None:
    with pytest.raises(RequestError, match="plain one"):
        build_target(short, session, "a {} [on the left:on the right:0.5]")


def test_the_empty_prompts_noise_is_not_computed_twice(session, short, monkeypatch) -> None:
    """With a blank negative prompt CFG's other side is the empty prompt."""
    calls = []
    predict = session.predict_at_once
    monkeypatch.setattr(session, "predict_at_once", lambda x, *a: calls.append(len(x)) or predict(x, *a))
    request = dataclasses.replace(short, prompt="a red circle")
    noise = latent_noise(request, session, TRAIN, 1)
    *_, bank = build_bank(session, build_target(request, session), noise, 5.0)
    assert sum(calls) == 2 * request.sampling_steps
    monkeypatch.undo()
    empty = noise_under(session, bank.x, bank.timestep, session.encode([""]))
    assert torch.allclose(bank.empty, empty, atol=1e-4)


def test_a_bank_can_take_fewer_steps(session, short) -> None:
    request = with_prompt(short, "a [red:blue:0.5] circle")
    noise = latent_noise(request, session, TRAIN, 1)
    *_, bank = build_bank(session, build_target(request, session), noise, 5.0, steps=4, offset=-0.5)
    assert bank.step.tolist() == [0, 2, 4, 6]
    assert bank.timestep[0] > 750


def test_a_few_levels_stand_for_the_steps_around_them(session, short) -> None:
    target = build_target(short, session)
    *_, path = session.sample(latent_noise(short, session, TRAIN, 2), target.guidance, 5.0)
    every, few = (bank_of(session, target, path, range(8), 5.0, levels=n, references=False) for n in (0, 4))
    *_, whole = build_bank(session, target, latent_noise(short, session, TRAIN, 2), 5.0, references=False)
    assert torch.equal(whole.x, every.x)
    assert few.step.tolist() == [1, 1, 3, 3, 5, 5, 7, 7]
    rows = torch.tensor([2, 3, 6, 7, 10, 11, 14, 15])
    assert torch.equal(few.x, every.x[rows])
    assert torch.equal(few.timestep, every.timestep[rows])
    assert torch.allclose(few.weight, every.weight[rows] + every.weight[rows - 2])


@pytest.mark.parametrize("effort", LEARNT_FROM)
def test_what_is_checked_lies_between_what_is_learnt_from(effort) -> None:
    (early, late), (checked,) = LEARNT_FROM[effort].offsets, CHECKS[effort].offsets
    assert -1 < late < checked < early < 0
    assert LEARNT_FROM[effort].count == CHECKS[effort].count >= 1


def test_an_embedding_in_the_prompt_is_part_of_the_target_with_its_weight(host, short, tmp_path) -> None:
    """Vectors that no word has: the target is what the model does under them, and their weight has to be learnt."""
    other = StandaloneHost.__new__(StandaloneHost)
    other.__dict__ |= host.__dict__ | {"embeddings": tmp_path}
    with host.session() as session:
        red, star = session.token_vectors("red star")["clip_l"]
    rows = {"clip_l": torch.stack([red + star, red - star])}
    writing.save(Embedding("oldword", rows, {}), tmp_path / "oldword.pt")
    request = dataclasses.replace(short, prompt="a (oldword:1.4) circle")
    with other.session() as session:
        target, plain = (
            build_target(dataclasses.replace(request, prompt=p), session) for p in (request.prompt, "a oldword circle")
        )
        own = session.token_vectors("a oldword circle")
        assert torch.equal(own["clip_l"][1:3], rows["clip_l"])
        with torch.no_grad():
            assert target.embed(session, own).close_to(plain.single())
        assert not target.single().close_to(plain.single())
        assert target.plain[0].positive[0][1].close_to(plain.single())
        words = build_target(dataclasses.replace(request, prompt="a (red star:1.4) circle"), session)
        assert not target.single().close_to(words.single())
    with host.session() as session:  # where nobody knows the embedding its name is plain words
        assert not build_target(request, session).single().close_to(target.single())


def test_an_embedding_makes_up_for_what_a_lora_does_to_the_negative_prompt() -> None:
    """Under CFG it guides as the prompt does with the LoRA, which is at work on both sides."""
    own, negative, beside = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = without_networks(own, negative, beside, 5.0)
    torch.testing.assert_close(beside + 5.0 * (wanted - beside), negative + 5.0 * (own - negative))
    torch.testing.assert_close(without_networks(own, negative, negative, 5.0), own)


def test_tags_are_taken_over_where_asked_and_no_part_of_the_text() -> None:
    session = SimpleNamespace(tags=lambda prompt: ("a circle", ["<lora:one:1>", "<lora:two:0.5>"]))
    request = EstimateRequest(prompt="a circle<lora:one:1><lora:two:0.5>", negative="<lora:no:1>", name="x")
    assert taken_over(dataclasses.replace(request, take_over_lora=True), session) == "<lora:one:1><lora:two:0.5>"
    assert taken_over(request, session) == ""
    assert own_text(request, session) == "a circle"
    assert own_text(dataclasses.replace(request, target=Which.NEGATIVE), session) == "<lora:no:1>"


def test_a_host_without_loras_refuses_to_have_one_taken_over(host, short) -> None:
    made = with_prompt(short, "a (red:1.6) circle <lora:some:1>", take_over_lora=True)
    with pytest.raises(ModelError, match="only in a webui"):
        list(job.estimate(made, host))
