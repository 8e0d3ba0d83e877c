"""Many requests on one model: checked first, resumed, interrupted, shared out."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest

from lib_estimate import batch as batch_module
from lib_estimate.batch import Batch, Ledger, Row, Share, table, write_table
from lib_estimate.errors import RequestError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.files.lists import Line
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.progress import Cancel, StepReport
from lib_estimate.request import Effort, EstimateRequest, Part, Target


@pytest.fixture
def lines(short) -> list[Line]:
    prompts = {"day": "a (red:1.6) circle", "night": "a (blue:1.5) square"}
    quick = dataclasses.replace(
        short, part=Part.CROSS_ATTENTION, effort=Effort.QUICK, width=64, height=64, sampling_steps=4
    )
    return [
        Line(f"line {number}", dataclasses.replace(quick, name=name, prompt=prompt))
        for number, (name, prompt) in enumerate(prompts.items(), 1)
    ]


def changed(lines: list[Line], **changes) -> list[Line]:
    return [Line(line.place, dataclasses.replace(line.request, **changes)) for line in lines]


def finish(batch: Batch, host, cancel: Cancel | None = None) -> list[Row]:
    for _ in batch.run(host, cancel or Cancel()):
        pass
    return batch.rows


def states(rows: list[Row]) -> list[str]:
    return [row.state for row in rows]


def test_every_line_becomes_a_file_and_a_row(lines, host, tmp_path) -> None:
    rows = finish(Batch(lines), host)
    assert states(rows) == [batch_module.MADE] * 2
    for line, row in zip(lines, rows, strict=True):
        made = reading.load(tmp_path / f"{line.request.name}.pt")
        assert made.metadata["prompt"] == line.request.prompt
        assert (row.vectors, row.recovered) == (3, made.metadata["recovered"])
        assert row.pictures == sum(made.metadata["forwards"].values()) / (2 * line.request.sampling_steps)


def test_it_goes_on_where_it_stopped(lines, host, tmp_path) -> None:
    finish(Batch(lines[:1]), host)
    before = (tmp_path / "day.pt").read_bytes()
    batch = Batch(lines)
    told = [type(moment.progress) for moment in batch.run(host, Cancel()) if moment.number == 1]
    assert told == [Row]  # nothing was run
    assert states(batch.rows) == [batch_module.THERE, batch_module.MADE]
    assert batch.rows[0].recovered is not None
    assert (tmp_path / "day.pt").read_bytes() == before
    # Another folder or leave to overwrite don't make it another request; a seed does.
    assert states(finish(Batch(changed(lines, overwrite=True)), host)) == [batch_module.THERE] * 2
    with pytest.raises(RequestError, match=r"line 1: .+ with other settings"):
        Batch(changed(lines, seed=3))
    assert states(finish(Batch(changed(lines[:1], seed=3, overwrite=True)), host)) == [batch_module.MADE]
    assert (tmp_path / "day.pt").read_bytes() != before


def test_a_line_may_make_several_words_and_is_known_again(lines, host, tmp_path) -> None:
    several = [
        *changed(lines[:1], target=Target.BOTH, negative="(blue:1.3), small", sentence=()),
        *changed(lines[1:], prompt="a [red:blue:0.5] circle", stages=True, sentence=()),
    ]
    several += changed(lines[1:], name="plain", prompt="a red circle", stages=True, sentence=())  # one text, one word
    assert states(finish(Batch(several), host)) == [batch_module.MADE] * 3
    assert sorted(path.stem for path in tmp_path.glob("*.pt")) == ["day", "day-neg", "night-1", "night-2", "plain"]
    assert states(finish(Batch(several), host)) == [batch_module.THERE] * 3


def test_a_file_made_on_another_checkpoint_is_not_taken_for_it(lines, host, tmp_path) -> None:
    (row,) = finish(Batch(lines[:1]), host)
    path = tmp_path / "day.pt"
    there = reading.load(path)
    other = Embedding("day", there.vectors, {**there.metadata, "sd_checkpoint": "0123456789"})
    writing.save(other, path, overwrite=True)
    (row,) = finish(Batch(lines[:1]), host)
    assert row.failed
    assert "made on" in row.state
    assert states(finish(Batch(changed(lines[:1], overwrite=True)), host)) == [batch_module.MADE]


def test_a_line_that_fails_does_not_stop_the_rest(lines, host, monkeypatch) -> None:
    broken = changed(lines[:1], name="broken", prompt="(a:1.5.2)")
    rows = finish(Batch([*broken, *lines[:1]]), host)
    assert rows[0].failed
    assert "1.5.2" in rows[0].state
    assert rows[1].state == batch_module.MADE

    def out_of_memory(*_: object) -> None:
        raise RuntimeError("out of memory\nand a trace")

    monkeypatch.setattr(batch_module, "estimate", out_of_memory)
    (row, _) = finish(Batch(changed(lines, overwrite=True, seed=1)), host)
    assert row.state == "failed: unexpected RuntimeError: out of memory"


def test_everything_is_checked_before_anything_is_made(lines, host, tmp_path) -> None:
    finish(Batch(lines[:1]), host)
    wrong = [
        Line("line 1", dataclasses.replace(lines[0].request, prompt="something else")),
        Line("line 2", dataclasses.replace(lines[1].request, name="a/b")),
        lines[1],
        Line("line 4", dataclasses.replace(lines[1].request, name="NIGHT")),
        Line("line 5", dataclasses.replace(lines[1].request, name="empty", prompt=" ")),
        Line("line 6", dataclasses.replace(lines[1].request, name="wide", width=-1)),
    ]
    with pytest.raises(RequestError) as told:
        Batch(wrong)
    said = str(told.value).splitlines()
    assert [sentence.partition(":")[0] for sentence in said] == ["line 1", "line 2", "line 4", "line 5", "line 6"]
    for sentence, words in zip(said, ["exists already", "a/b", "line 2", "empty", "width"], strict=True):
        assert words in sentence
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["day.pt"]


def test_an_interrupt_saves_the_line_and_stops(lines, host, tmp_path) -> None:
    lines, cancel = changed(lines, steps=50), Cancel()
    batch = Batch(lines)
    for moment in batch.run(host, cancel):
        if isinstance(moment.progress, StepReport) and moment.progress.step == 2:
            cancel.save()
    assert states(batch.rows) == [batch_module.STOPPED, batch_module.NOT_STARTED]
    assert [path.name for path in tmp_path.glob("*.pt")] == ["day.pt"]
    # What was interrupted is left alone, and said to be so, unless it may be overwritten.
    (row,) = finish(Batch(lines[:1]), host)
    assert row.state == batch_module.STOPPED_BEFORE
    again = changed(lines[:1], overwrite=True)
    first = next(iter(Batch(again).run(host, Cancel())))
    assert not isinstance(first.progress, Row)


def test_an_interrupt_that_drops_everything_stops_too(lines, host, tmp_path) -> None:
    cancel, batch = Cancel(), Batch(lines)
    for moment in batch.run(host, cancel):
        if isinstance(moment.progress, StepReport):
            cancel.discard()
    assert states(batch.rows) == [batch_module.DROPPED, batch_module.NOT_STARTED]
    assert not list(tmp_path.glob("*.pt"))


def test_the_words_of_a_list_are_plain_words_in_its_prompts(lines, host, tmp_path) -> None:
    """Styles are called by words that stand in the prompts of other styles."""
    finish(Batch(changed(lines[:1], name="circle")), host)
    own = StandaloneHost.without(host, ())
    own.embeddings = tmp_path
    with own.session() as session:
        assert len(session.token_vectors("circle")["clip_l"]) == 3
    with own.without({"Circle"}).session() as session:
        assert len(session.token_vectors("circle")["clip_l"]) == 1
    known = [Line("line 1", dataclasses.replace(lines[0].request, name="circle")), lines[0]]
    assert [row.vectors for row in finish(Batch(known), own)] == [3, 3]


# ---- several processes --------------------------------------------------------------------------------------------


def test_the_environment_says_which_lines_are_ours() -> None:
    assert Share.of({}) == Share.of({"WORLD_SIZE": "1", "RANK": "0"}) == Share()
    assert Share.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Share(5, 8, 1)


def test_each_process_makes_its_own_lines(lines, host) -> None:
    second = Batch(lines, Share(1, 2, 1))
    assert {moment.number for moment in second.run(host, Cancel())} == {2}
    assert states(second.rows) == [batch_module.NOT_STARTED, batch_module.MADE]


def test_the_first_process_gathers_the_rows_of_all(lines, tmp_path) -> None:
    both = [Batch(lines, Share(rank, 2, rank)) for rank in (0, 1)]
    for rank, batch in enumerate(both):
        batch.rows[rank] = Row(lines[rank].request.name, 3, 0.1 * rank, 0.9, 11.0, batch_module.MADE)
    first, second = (Ledger(tmp_path / "t.csv", batch) for batch in both)
    first.write(done=True)
    second.write()
    late = threading.Timer(0.5, second.write, kwargs={"done": True})
    late.start()
    rows = first.gather()
    assert states(rows) == [batch_module.MADE] * 2
    assert [row.name for row in rows] == ["day", "night"]
    assert not list(tmp_path.glob("*.json"))


def test_a_process_that_went_silent_is_a_failure(lines, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(batch_module, "PATIENCE", 0.3)
    ledger = Ledger(tmp_path / "t.csv", Batch(lines, Share(0, 2, 0)))
    ledger.write(done=True)
    other = {"names": ["of", "another list"], "count": 2, "done": True, "rows": []}
    ledger.paths[1].write_text(json.dumps(other))
    assert [row.failed for row in ledger.gather()] == [False, True]


def test_the_table_is_text_and_csv(tmp_path) -> None:
    rows = [Row("day", 3, 0.1234, None, 11.4, batch_module.MADE), Row("a, b", state=batch_module.FAILED + 'no "x"')]
    lines = table(rows).splitlines()
    assert lines[0].split() == " ".join(batch_module.HEADINGS).split()
    assert lines[1].split() == ["day", "3", "0.123", "11.4", "made"]
    assert lines[-1] == "2 lines: 1 made, 1 failed."
    write_table(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_text().splitlines() == [
        "name,vectors,picture_error,recovered,cost_in_pictures,state",
        "day,3,0.1234,,11.4,made",
        '"a, b",,,,,"failed: no ""x"""',
    ]


def test_a_list_of_nothing_said_is_the_defaults(lines) -> None:
    """A file that an older version made has fewer settings: what is missing is what it was then."""
    settings = lines[0].request.record()
    settings.pop("clip_gradient")
    assert batch_module._same_settings(settings, lines[0].request)
    assert not batch_module._same_settings({**settings, "seed": 9}, lines[0].request)
    assert not batch_module._same_settings(None, EstimateRequest())
