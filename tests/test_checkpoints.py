"""One embedding for several checkpoints: the small model and two fine-tunes of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lib_estimate import batch, job
from lib_estimate import words as words_module
from lib_estimate.errors import EstimateError
from lib_estimate.files import reading
from lib_estimate.files.lists import Line
from lib_estimate.hosts.base import Network
from lib_estimate.hosts.several import Several
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.learn.needs import shared
from lib_estimate.measuring import measured
from lib_estimate.progress import Cancel
from lib_estimate.report.checkpoints import Courts
from lib_estimate.report.fidelity import Court, first_good
from lib_estimate.report.in_words import result_sentence
from lib_estimate.request import Effort, EstimateRequest, ModelOptions, Part, Target, Use
from lib_estimate.target.target import build_target
from tests.conftest import run
from tests.small_models import small_model

NAMES = ["shapes_sd", "paper"]
REQUEST = EstimateRequest(
    prompt="a (small:1.5) red circle to the left of a large blue star", name="word", use=Use.WHOLE,
    effort=Effort.QUICK, images=0, steps=30, sampling_steps=6, width=64, height=64, sentence=("a photo of {}",),
)  # fmt: skip


@pytest.fixture(scope="module")
def both(relatives) -> Several:
    return Several([relatives[0], relatives[2]])


@pytest.fixture(scope="module")
def words(both, tmp_path_factory) -> dict[str, job.Outcome]:
    """The same word, made on one checkpoint and on both."""
    out = str(tmp_path_factory.mktemp("words"))
    return {
        "one": run(replace(REQUEST, name="one", out=out), both.hosts[0]),
        "both": run(replace(REQUEST, name="both", out=out), both),
    }


def test_a_word_made_on_both_carries_further_than_one_made_on_one(words, both) -> None:
    *_, one = measured(reading.load(words["one"].path), REQUEST, both)
    alone, together = (
        {row.name: 1 - row.fidelity.recovered for row in fidelity.checkpoints}  # what is left of the emphasis
        for fidelity in (one, words["both"].fidelity)
    )
    base, other = NAMES
    assert list(alone) == list(together) == NAMES
    assert alone[other] > 1.5 * alone[base]
    assert together[other] < 0.7 * alone[other]


def test_each_checkpoint_costs_as_much_as_one_alone(words) -> None:
    for part, forwards in words["one"].record["forwards"].items():
        assert words["both"].record["forwards"][part] == pytest.approx(2 * forwards, rel=0.15)


def test_the_file_and_the_report_have_a_row_for_each(words) -> None:
    outcome = words["both"]
    rows = reading.load(outcome.path).metadata["checkpoints"]
    assert [row["name"] for row in rows] == NAMES
    assert len({row["hash"] for row in rows}) == 2
    assert [row["error"] for row in rows] == [row["error"] for row in outcome.record["checkpoints"]]
    assert rows[0]["error"] == outcome.record["error"] != rows[1]["error"]
    said = result_sentence(outcome.fidelity, "both").splitlines()
    assert [line.split(":")[0] for line in said[-2:]] == [f"On {name}" for name in NAMES]
    assert "checkpoints" not in words["one"].record


def test_what_is_worse_on_one_checkpoint_is_not_taken(relatives, short) -> None:
    """The first candidate is refused by the second checkpoint alone."""
    first, second = relatives[:2]
    with first.session() as a, second.session() as b:
        courts = [Court(s, build_target(short, s), short, ()) for s in (a, b)]
        own, none = a.token_vectors("a red circle"), a.token_vectors("a green star")
        courts[0].bars, courts[1].bars = [], [lambda fidelity: fidelity.error > 0.5]
        *_, fidelity = first_good(Courts(courts), [lambda: none, lambda: own])
        assert fidelity.taken == 1
        *_, last = first_good(Courts(courts), [lambda: none])
        said = result_sentence(last, "word")
    assert all(row.worse for row in last.checkpoints)
    assert "On dusk: error" in said
    assert said.count("Leaving the weights out does better there.") == 2


@pytest.mark.parametrize("use", [Use.ANYWHERE, Use.SENTENCE])
def test_every_use_can_be_learnt_on_several(use, relatives, short) -> None:
    request = replace(
        short, use=use, part=Part.AUTO, effort=Effort.QUICK, steps=4, trajectories=0, sampling_steps=4,
        sentence=("a photo of {}", "{} on the left"), width=64, height=64,
    )  # fmt: skip
    outcome = run(request, Several(relatives[:2]))
    assert outcome.losses[outcome.record["stages"][0]["steps_run"] - 1] < outcome.losses[0]
    assert all(len(row.fidelity.sentences) >= 2 for row in outcome.fidelity.checkpoints)


def test_only_one_unet_at_a_time_is_asked_for_where_one_runs_at_a_time(both, short, monkeypatch) -> None:
    """On a card, others take room: while one checkpoint is recorded, sketched and reported on."""
    held, seen, predict = {}, [], StandaloneSession.predict_at_once

    def watched(self, *given):
        seen.append([name for name, networks in held.items() if Network.UNET in networks])
        return predict(self, *given)

    monkeypatch.setattr(StandaloneSession, "place", lambda self, *networks: held.update({self.info.name: networks}))
    monkeypatch.setattr(StandaloneSession, "predict_at_once", watched)
    run(replace(REQUEST, steps=2, sampling_steps=2, out=short.out), both)
    assert {tuple(names) for names in seen} == {(name,) for name in NAMES}


def test_models_of_different_widths_are_refused_by_name(host, short, tmp_path) -> None:
    other = StandaloneHost(ModelOptions(model=str(small_model("sd2").single_file(tmp_path / "other.safetensors"))))
    with pytest.raises(EstimateError, match=r"shapes_sd and other can't share an embedding.*clip_l 96.*clip_h 48"):
        run(short, Several([host, other]))


@pytest.mark.parametrize("change", [{"stages": True}, {"target": Target.BOTH, "negative": "(blue:1.5)"}])
def test_several_words_are_made_on_one_checkpoint_only(change, both, short) -> None:
    with pytest.raises(EstimateError, match="give one --model"):
        list(words_module.estimate(replace(short, **change), both))


def test_a_batch_makes_a_word_again_for_other_checkpoints(relatives, short) -> None:
    request, hosts = replace(REQUEST, part=Part.TRANSFORMER, steps=1, sampling_steps=2, out=short.out), relatives[:2]

    def states(hosts) -> list[str]:
        made = batch.Batch([Line("line 1", request)])
        list(made.run(Several(hosts), Cancel()))
        return [row.state for row in made.rows]

    assert states(hosts) == [batch.MADE]
    assert states(hosts) == [batch.THERE]
    assert "made on shapes_sd, dusk" in states(relatives)[0]


def test_the_room_is_shared(relatives) -> None:
    """What each has there already counts as free for all; what all of them weigh has to fit."""
    with relatives[0].session() as a, relatives[1].session() as b:
        rooms = [replace(session.room(), free=10, there=there) for session, there in ((a, 3), (b, 4))]
    room = shared(rooms)
    assert room.free == 14
    assert room.weights[Network.UNET] == 2 * rooms[0].weights[Network.UNET] > 0
