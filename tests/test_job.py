"""Whole estimates on the small trained model: the figures, the file, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate import job
from lib_estimate.errors import EstimateError, ReportFailed, RequestError
from lib_estimate.files import reading
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.standalone import StandaloneSession
from lib_estimate.learn import starts
from lib_estimate.measuring import measured
from lib_estimate.progress import Cancel, Interrupted, Note, StepReport
from lib_estimate.request import Part, Target
from lib_estimate.target.error import recovered_share
from tests.conftest import all_parameters, run


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(("part", "share"), [(Part.CROSS_ATTENTION, 0.3), (Part.UNET, 0.6), (Part.TRANSFORMER, 0.7)])
def test_every_part_finds_the_prompt_from_a_wrong_start(part, share, host, short) -> None:
    """Starting from another colour and shape, which is as far away as an empty prompt or farther."""
    request = dataclasses.replace(short, prompt="a red circle", init="a blue star", part=part)
    start = run(dataclasses.replace(request, steps=1, learning_rate="1e-9"), host).fidelity.error
    steps = {Part.TRANSFORMER: 150, Part.CROSS_ATTENTION: 30, Part.UNET: 5}[part]
    error = run(dataclasses.replace(request, steps=steps, overwrite=True), host).fidelity.error
    assert start > 0.5
    assert error < share * start, (start, error)


def test_a_prompt_without_weights_is_matched_by_its_own_tokens(host, short) -> None:
    outcome = run(dataclasses.replace(short, prompt="a red circle", steps=2), host)
    assert outcome.fidelity.error < 1e-4
    assert outcome.fidelity.unweighted_error is None
    assert outcome.fidelity.recovered is None


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a [red:(blue:1.5):0.5] circle"},
        {"prompt": "a (red:1.5) circle AND a blue square :0.5"},
        {"prompt": "a (red:1.5) circle BREAK on a white background"},
        {"target": Target.NEGATIVE, "negative": "(red:1.4), small"},
    ],
    ids=["editing", "AND", "BREAK", "negative"],
)
def test_every_kind_of_prompt_can_be_learnt(change, host, short) -> None:
    losses = run(dataclasses.replace(short, steps=3, init="a blue circle", **change), host).losses
    assert losses[-1] < 0.9 * losses[0]


def test_the_saved_file_holds_the_best_vectors_and_how_they_came(host, short) -> None:
    outcome = run(short, host)
    read = reading.load(outcome.path)
    assert torch.equal(read.vectors["clip_l"], outcome.embedding.vectors["clip_l"].cpu())
    assert read.metadata["prompt"] == short.prompt
    assert read.metadata["settings"] == short.record()
    assert read.metadata["error"] == pytest.approx(outcome.fidelity.error)
    assert read.metadata["sd_checkpoint_name"] == host.parts.name
    assert read.metadata["sd_checkpoint"] == host.parts.hash


def test_measuring_the_file_gives_the_figures_of_the_run(host, short) -> None:
    outcome = run(short, host)
    *_, fidelity = measured(reading.load(outcome.path), short, host)
    assert fidelity.error == pytest.approx(outcome.fidelity.error, rel=1e-3)


def test_a_seed_repeats_a_run_bit_for_bit(host, short) -> None:
    first = run(short, host)
    again = run(dataclasses.replace(short, overwrite=True), host)
    other = run(dataclasses.replace(short, overwrite=True, seed=5), host)
    assert first.losses == again.losses
    assert torch.equal(first.embedding.vectors["clip_l"], again.embedding.vectors["clip_l"])
    assert first.losses != other.losses


def test_the_model_is_as_it_was_before(host, short) -> None:
    before = all_parameters(host)
    flags = [p.requires_grad for p in host.parts.unet.parameters()]
    run(short, host)
    assert all(torch.equal(a, b) for a, b in zip(before, all_parameters(host), strict=True))
    assert [p.requires_grad for p in host.parts.unet.parameters()] == flags


def test_the_model_is_given_back_after_an_error(host, short, monkeypatch) -> None:
    flags = [p.requires_grad for p in host.parts.unet.parameters()]
    text = getattr(host.parts.text_encoders[0].model, "text_model", host.parts.text_encoders[0].model)

    def breaks(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(starts, "initial_vectors", breaks)
    with pytest.raises(RuntimeError):
        run(short, host)
    assert [p.requires_grad for p in host.parts.unet.parameters()] == flags
    assert not text.embeddings.token_embedding._forward_hooks


def test_an_interrupted_run_saves_its_best(host, short) -> None:
    cancel = Cancel()
    for progress in job.estimate(dataclasses.replace(short, steps=500), host, cancel):
        if isinstance(progress, StepReport) and progress.step == 5:
            cancel.save()
    assert progress.path.exists()
    assert progress.record["steps_run"] == 5
    assert progress.record["stopped"] == "interrupted"


def test_a_discarded_run_saves_nothing(host, short, tmp_path) -> None:
    cancel = Cancel()
    run = job.estimate(short, host, cancel)
    next(progress for progress in run if isinstance(progress, StepReport))
    cancel.discard()
    with pytest.raises(Interrupted, match="Nothing was saved"):
        list(run)
    assert files(tmp_path) == []


def test_learning_is_not_lost_when_the_report_fails(host, short, tmp_path, monkeypatch) -> None:
    def breaks(*_):
        raise RuntimeError("out of memory")
        yield

    monkeypatch.setattr(job, "first_good", breaks)
    with pytest.raises(ReportFailed, match=r"is saved \(.*short\.pt\).*RuntimeError: out of memory"):
        run(short, host)
    assert files(tmp_path) == ["short.pt"]


def test_an_existing_file_is_refused_before_anything_starts(short, tmp_path) -> None:
    path = tmp_path / "short.pt"
    path.write_bytes(b"mine")
    with pytest.raises(EstimateError, match="exists already"):
        next(job.estimate(short, host=None))
    assert path.read_bytes() == b"mine"


def test_overwriting_replaces_that_file_and_no_other(host, short, tmp_path) -> None:
    (tmp_path / "short.pt").write_bytes(b"mine")
    (tmp_path / "shorter.pt").write_bytes(b"other")
    run(dataclasses.replace(short, overwrite=True), host)
    assert (tmp_path / "shorter.pt").read_bytes() == b"other"
    assert reading.load(tmp_path / "short.pt").metadata["prompt"] == short.prompt


@pytest.mark.parametrize("prompt", ["()", "( , )x"[:2]])
def test_a_prompt_that_does_nothing_is_refused(prompt, host, short, tmp_path) -> None:
    with pytest.raises(RequestError):
        run(dataclasses.replace(short, prompt=prompt, init="red"), host)
    assert files(tmp_path) == []


def test_a_size_that_latents_cannot_have_is_refused(host, short, tmp_path) -> None:
    with pytest.raises(EstimateError, match="multiple of 8"):
        next(job.estimate(dataclasses.replace(short, width=100), host))


def test_a_common_word_as_name_is_warned_about(host, short) -> None:
    progress = job.estimate(dataclasses.replace(short, name="cat", steps=1), host)
    assert any(isinstance(p, Note) and '"cat"' in p.text for p in progress)


def test_the_vectors_of_another_model_are_refused(host, short) -> None:
    other = Embedding("other", {"clip_l": torch.zeros(2, 5)}, {})
    with pytest.raises(EstimateError, match="width 5"):
        list(measured(other, short, host))


@pytest.mark.parametrize(
    ("error", "plain", "share"), [(0.1, 0.4, 0.75), (0.4, 0.4, 0.0), (0.1, None, None), (0.1, 0.0, None)]
)
def test_recovered_share(error, plain, share) -> None:
    assert recovered_share(error, plain) == share


def test_where_memory_is_short_the_unet_takes_less_at_once(host, short, monkeypatch) -> None:
    """Room for four latents, or for one with its gradient where activations aren't kept; the recording has eight."""
    predict, seen = StandaloneSession.predict_at_once, []

    def little_room(self, x, timestep, conditioning):
        learning = torch.is_grad_enabled() and conditioning.hidden.requires_grad
        if learning:
            seen.append((len(x), self.placement.recomputes))
            if len(x) > 1 or not self.placement.recomputes:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        elif len(x) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(self, x, timestep, conditioning)

    request = dataclasses.replace(short, steps=1)
    roomy = run(request, host)
    monkeypatch.setattr(StandaloneSession, "predict_at_once", little_room)
    *progress, tight = job.estimate(dataclasses.replace(request, overwrite=True), host)
    assert seen[:2] == [(8, False), (1, False)]
    assert set(seen[2:]) == {(1, True)}
    assert any(isinstance(p, Note) and "Memory was short" in p.text for p in progress)
    assert tight.record["losses"] == pytest.approx(roomy.record["losses"], rel=1e-3)
    assert not any("forward" in vars(module) for module in host.parts.unet.modules())
