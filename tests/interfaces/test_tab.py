"""The tab: what its fields make, and a real browser that uses it."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Iterator

import pytest
import torch

from lib_estimate.errors import RequestError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.several import Several
from lib_estimate.interfaces import fields, standalone_tab, view
from lib_estimate.interfaces import tab as tab_module
from lib_estimate.interfaces.inside_tab import InsideTab
from lib_estimate.interfaces.shell import taken_in
from lib_estimate.interfaces.time_left import Pace
from lib_estimate.request import AUTO_VECTORS, Effort, EstimateRequest, ModelOptions, Part, Target, Use
from tests.conftest import SHAPES_SD
from tests.interfaces import browser

PROMPT = "a (red:1.6) circle"
OWN_PAGE = int(tab_module.gr.__version__.split(".")[0]) >= 6
needs_own_page = pytest.mark.skipif(not OWN_PAGE, reason="the tab without a webui wants gradio 6")


class Shell:
    """A program that has nothing."""

    live = OWN_PAGE  # an older Gradio is a webui's

    def start_values(self) -> dict:
        return {"part": "unet"}

    def embeddings_folder(self) -> str:
        return "somewhere"

    def styles(self) -> tuple:
        return (("--- STYLES ---", "", ""), ("day", "a (red:1.4) circle", "blurry"))

    def checkpoints(self) -> tuple:
        return ()

    def about(self) -> dict:
        return {}

    def send_buttons(self) -> tuple:
        return ("txt2img", "img2img")

    def interrupted(self) -> bool:
        return False

    def wrap(self, run, failed):
        return run


@pytest.fixture(scope="module")
def tab() -> tab_module.Tab:
    made = tab_module.Tab(Shell())
    with tab_module.gr.Blocks():
        made.lay_out()
    return made


def values(tab: tab_module.Tab, **changes) -> dict:
    return {name: component.value for name, component in tab.fields.items()} | changes


def test_every_field_of_the_request_is_in_the_tab_or_left_out_for_a_reason(tab) -> None:
    known = {item.name for item in dataclasses.fields(EstimateRequest)}
    assert set(tab.fields) - {"vector_count"} == known - set(fields.LEFT_OUT)
    assert set(fields.LEFT_OUT) <= known


def test_untouched_fields_make_the_default_request(tab) -> None:
    made = fields.request_from(values(tab, part=fields.WORDS["auto"]))
    assert made == EstimateRequest()


def test_a_program_may_begin_with_other_values(tab) -> None:
    assert fields.request_from(values(tab)).part is Part.UNET


def test_fields_make_the_request_they_say(tab) -> None:
    made = fields.request_from(
        values(
            tab, prompt=PROMPT, negative="blurry", name=" my char ", target="Negative prompt", use="In this sentence",
            sentence="a photo of {}\n\n{} at night ", vectors=fields.COUNTS[fields.NUMBER], vector_count=9, steps=12,
            optimizer="SGD", learning_rate="0.005:100, 1e-3", overwrite=True, cfg_scale=7.5,
        )
    )  # fmt: skip
    assert made.target is Target.NEGATIVE
    assert made.use is Use.SENTENCE
    assert made.sentence == ("a photo of {}", "{} at night")
    assert (made.vectors, made.steps, made.name, made.cfg_scale) == (9, 12, "my char", 7.5)
    assert made.validate().overwrite is True
    assert fields.request_from(values(tab, vectors=fields.COUNTS[AUTO_VECTORS])).vectors == AUTO_VECTORS


def test_what_is_out_of_range_is_refused_by_the_request(tab) -> None:
    with pytest.raises(RequestError, match="seed"):
        fields.request_from(values(tab, prompt=PROMPT, seed=-1)).validate()


def test_sliders_reach_their_defaults(tab) -> None:
    sliders = [c for c in tab.fields.values() if isinstance(c, tab_module.gr.Slider)]
    assert len(sliders) > 3
    for slider in sliders:
        steps = (slider.value - slider.minimum) / slider.step
        assert steps == pytest.approx(round(steps)), slider.label


def test_sentences_name_what_is_in_the_tab() -> None:
    said = {
        "allow overwriting (--overwrite).": "allow overwriting (“Overwrite an existing embedding of this name”).",
        "Use --use whole.": "Use “As the whole prompt”.",
        "give it as --sentence 'a {}'.": "give it as “The sentence, with {} for the word (one per line)” 'a {}'.",
        "Use --dtype float32; runs with --medvram": "Use --dtype float32; runs with --medvram",
    }
    assert {sentence: fields.in_the_tab(sentence) for sentence in said} == said


def test_a_run_that_fails_takes_down_older_results(tab, monkeypatch, tmp_path) -> None:
    refused = list(tab._run(list(values(tab, prompt="").values())))[-1]
    assert refused[1] == refused[2] == tab_module.gr.update()  # nothing has begun: what is there still holds

    monkeypatch.setattr(tab.shell, "host", lambda: 1 / 0, raising=False)
    first, last = tab._run(list(values(tab, prompt=PROMPT, name="x").values()))
    for shown in (first, last):
        assert shown[1] == shown[2] == tab_module.gr.update(value=None)
    assert "ZeroDivisionError" in last[3]


def test_an_unexpected_error_comes_with_what_to_report_and_nothing_private(tab, monkeypatch, tmp_path) -> None:
    home, typed = str(tmp_path / "ann"), "my (secret:1.3) garden"
    monkeypatch.setenv("HOME", home)
    monkeypatch.setenv("USERPROFILE", home)

    def breaks() -> None:
        raise RuntimeError(f"no way with {typed!r} in {home}/pictures")

    monkeypatch.setattr(tab.shell, "host", breaks, raising=False)
    monkeypatch.setattr(tab.shell, "about", lambda: {"host": "a test", "checkpoint": "small"}, raising=False)
    given = values(tab, prompt=typed, name="Rosebud", negative="thorns", steps=7)
    shown = list(tab._run(list(given.values())))[-1][3]
    sentence, _, report = shown.partition("<details>")
    assert "Unexpected RuntimeError" in sentence
    for fact in (
        f"torch: {torch.__version__}",
        "host: a test",
        "checkpoint: small",
        "&#x27;steps&#x27;: 7",
        "device: ",
    ):
        assert fact in report, fact
    assert "in breaks: raise RuntimeError" in report
    assert "lib_estimate/interfaces/tab.py:" in report
    assert "RuntimeError: no way with &#x27;&lt;prompt&gt;&#x27; in ~/pictures" in report
    for private in ("secret", "Rosebud", "thorns", "ann", str(tmp_path)):
        assert private not in report, private
    monkeypatch.setattr(tab.shell, "about", lambda: 1 / 0)
    assert "host: not known (ZeroDivisionError)" in list(tab._run(list(given.values())))[-1][3]


class Queued(Shell):
    """A program with a queue, in which somebody switches the checkpoint."""

    live, switches = False, True

    def __init__(self) -> None:
        self.name = "first"

    def checkpoint(self) -> str:
        return self.name

    def wrap(self, run, failed):
        def waited(*given):
            self.name = "second" if self.switches else self.name
            return run(*given)

        return waited


@pytest.mark.parametrize("switches", [True, False])
def test_a_checkpoint_that_was_switched_while_a_run_waited_is_named(switches) -> None:
    shell = Queued()
    shell.switches = switches
    blocks = tab_module.build(shell)
    (event,) = [
        f for f in blocks.fns.values()
        if any(t is not None and blocks.blocks[t].elem_id == "embedding_estimate_estimate" for t, _ in f.targets)
    ]  # fmt: skip
    shown = event.fn("task", *(component.value for component in event.inputs[1:]))
    assert ("switched from first to second" in shown[3]) == switches
    assert "prompt is empty" in shown[3]


def test_a_refusal_is_no_bug(tab) -> None:
    assert "<details>" not in list(tab._run(list(values(tab, prompt="").values())))[-1][3]


def test_element_ids_are_ours_and_unique(tab) -> None:
    blocks = tab_module.build(Shell())
    ids = [block.elem_id for block in blocks.blocks.values() if getattr(block, "elem_id", None)]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("embedding_estimate_") for name in ids)
    interactive = [b for b in blocks.blocks.values() if type(b).__name__ in ("Button", "Textbox", "Slider", "Radio")]
    assert all(block.elem_id for block in interactive)


def test_labels_are_unique_as_the_webui_remembers_values_by_them(tab) -> None:
    labels = [component.label for component in tab.fields.values()]
    assert len(labels) == len(set(labels))


def test_the_style_hides_fields_by_the_words_of_the_tab() -> None:
    style = standalone_tab.STYLE.read_text(encoding="utf-8")
    for source, word, shown in (
        ("use", fields.WORDS["sentence"], "sentence"),
        ("target", fields.WORDS["negative"], "beside"),
        ("vectors", fields.COUNTS[fields.NUMBER], "vector_count"),
    ):
        chosen = f'#{fields.identifier(source)} input[value="{word}"]:checked'
        assert f"#embedding_estimate_columns:not(:has({chosen}))\n#{fields.identifier(shown)}" in style


def test_what_a_run_takes_is_told_in_time_once_one_was_timed(tab, monkeypatch) -> None:
    monkeypatch.setattr(view, "known", {(0, 0): Pace(3.0, 10)})
    timed = view.takes(EstimateRequest(prompt=PROMPT))
    assert [said.split()[-1] for said in timed.values()] == ["min"] * 3
    assert "pictures' worth" in view.takes(EstimateRequest(prompt=PROMPT, width=512))[Effort.QUICK]


def test_an_interrupt_without_a_run_is_forgotten(tab) -> None:
    tab._stop("discard")
    assert tab.cancel is None


def test_a_wrong_value_becomes_a_sentence(tab) -> None:
    given = list(values(tab, prompt="").values())
    *_, shown = tab._run(given)
    assert "there is nothing to estimate" in shown[3]
    assert "bad" in shown[3]


def test_an_emptied_number_of_vectors_is_refused_in_words(tab) -> None:
    with pytest.raises(RequestError, match="vectors is 0"):
        fields.request_from(
            values(tab, prompt=PROMPT, vectors=fields.COUNTS[fields.NUMBER], vector_count=None)
        ).validate()


def test_values_of_the_settings_page_are_not_remembered_elsewhere(tab) -> None:
    assert tab.fields["part"].do_not_save_to_config
    assert not tab.fields["use"].do_not_save_to_config


def test_a_run_that_is_forgotten_still_fills_every_output(tab, monkeypatch) -> None:
    for found in (None, ["too", "few"]):
        monkeypatch.setattr(tab.shell, "restore", lambda task, found=found: found, raising=False)
        assert len(tab._restore("task(1)")) == len(tab.outputs)


def test_a_program_that_fails_to_take_a_file_in_is_a_note(tab, monkeypatch, tmp_path) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(tab.shell, "saved", fail, raising=False)
    (note,) = taken_in(tab.shell, EstimateRequest(), tmp_path / "x.pt", None, "")
    assert "is saved" in note


def test_counting_tokens_leaves_the_weights_of_a_run_frozen(tmp_path) -> None:
    shell = standalone_tab.StandaloneShell([ModelOptions(model=str(SHAPES_SD), device="cpu")], str(tmp_path))
    with shell.model.session(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(shell.model, "session", None)  # a session of its own would give the weights back
        assert shell.count_tokens(PROMPT, 20, False) == "3/75"
        assert not any(p.requires_grad for p in shell.model.parts.unet.parameters())


@needs_own_page
def test_of_several_models_each_has_its_line_and_its_pictures(relatives, tmp_path) -> None:
    shell = standalone_tab.StandaloneShell.__new__(standalone_tab.StandaloneShell)
    shell.folder, shell.model = str(tmp_path), Several(relatives[:2])
    assert shell.count_tokens(PROMPT, 20, False) == "3/75"
    tab = tab_module.Tab(shell)
    with tab_module.gr.Blocks():
        tab.lay_out()
    given = {name: field.value for name, field in tab.fields.items()} | {
        "prompt": PROMPT, "name": "word", "part": "Transformer", "steps": 1, "images": 1, "sampling_steps": 4,
        "use": "As the whole prompt", "sentence": "a photo of {}", "width": 64, "height": 64,
    }  # fmt: skip
    *_, shown = tab._run(list(given.values()))
    pictures, result = shown[2], shown[3]
    assert [title for _, title in pictures[::3]] == ["prompt, shapes_sd", "prompt, dusk"]
    assert len(pictures) == 6
    assert "<br>On shapes_sd: picture error" in result
    assert "<br>On dusk: picture error" in result

    # The same word measured, on both again, and on one of them alone.
    *_, both = tab._run_measuring(["word", ["shapes_sd", "dusk"], *given.values()])
    assert [title for _, title in both[2]] == [title for _, title in pictures]
    assert result.startswith(both[3].split("<br>")[0])
    progress = [shown[0] for shown in tab._run_measuring(["word", ["dusk"], *given.values()])]
    assert "Measured." in progress[-1]
    assert "On dusk" not in both[0]
    for name, said in ((None, "Choose an embedding"), ("none", "no embedding")):
        assert said in list(tab._run_measuring([name, [], *given.values()]))[-1][3]


@needs_own_page
def test_a_measurement_can_be_interrupted(host, tmp_path) -> None:
    shell = standalone_tab.StandaloneShell.__new__(standalone_tab.StandaloneShell)
    shell.folder, shell.model = str(tmp_path), host
    writing.save(Embedding("word", {"clip_l": torch.zeros(1, 96)}, {}), tmp_path / "word.pt")
    tab = tab_module.Tab(shell)
    with tab_module.gr.Blocks():
        tab.lay_out()
    running = tab._run_measuring(["word", [], *values(tab, prompt=PROMPT, width=64, height=64).values()])
    next(running)
    tab._stop("save")
    *_, last = running
    assert "Nothing was measured" in last[3]


# ---- a batch ------------------------------------------------------------------------------------------------------


class Batched(standalone_tab.StandaloneShell):
    """The small model with styles, and a memory of the files it is told of."""

    def __init__(self, host, folder) -> None:
        self.model, self.folder, self.told = host, str(folder), []

    def styles(self) -> tuple:
        return (("----- STYLES -----", "", ""), ("dusk", "a (red:1.6) circle, {prompt}", "(blue:1.3)"))

    def saved(self, request, path, picture, description) -> None:
        self.told.append((path.stem, path.exists(), description.splitlines()[-1]))


QUICK = {
    "effort": "Quick", "steps": 2, "part": "Cross-attention", "use": "As the whole prompt", "images": 0, "width": 64,
    "height": 64, "sampling_steps": 4, "sentence": "a small {}",
}  # fmt: skip


def press(shell, button: str, *first) -> list[list]:
    """What a press of a button shows, one after the other; `first` are the inputs before the fields."""
    made = tab_module.build(shell)
    (event,) = [
        f for f in made.fns.values() if any(t in made.blocks and made.blocks[t].elem_id == button for t, _ in f.targets)
    ]
    names = [component.elem_id.removeprefix("embedding_estimate_") for component in event.inputs]
    assert names[: len(first)] == ["task", "batch_file", "batch_styles"]
    given = [QUICK.get(name, event.inputs[i].value) for i, name in enumerate(names) if i >= len(first)]
    return list(event.fn(*first, *given))


@needs_own_page
def test_a_batch_of_a_file_and_of_styles_that_are_ticked(host, tmp_path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("day\ta (blue:1.5) square\nbroken\t(a:1.5.2)\n", encoding="utf-8")
    shell = Batched(host, tmp_path / "out")
    shown = press(shell, "embedding_estimate_batch_estimate", "task", str(listed), ["dusk"])
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.pt")) == ["day", "dusk", "dusk-neg"]
    progress = [step[0] for step in shown if isinstance(step[0], str)]
    assert any("Line 1 of 4 (day): Learning" in words for words in progress)
    assert any("Line 4 of 4 (dusk-neg)" in words for words in progress)
    assert "4 lines: 3 made, 1 failed." in progress[-1]
    result = shown[-1][3]
    assert result.count("<td>made</td>") == 3
    assert "1.5.2" in result
    assert "{prompt}" in result  # the note
    assert shell.told == [
        ("day", True, "a (blue:1.5) square"),
        ("dusk", True, "a (red:1.6) circle"),
        ("dusk-neg", True, "(blue:1.3)"),
    ]

    shell.told.clear()
    *_, last = press(shell, "embedding_estimate_batch_estimate", "task", None, ["dusk"])
    assert "2 lines: 2 made before." in last[3]
    assert shell.told == []


@needs_own_page
def test_several_words_are_told_to_the_program_and_what_to_write(host, tmp_path) -> None:
    batched = tab_module.Tab(Batched(host, tmp_path))
    with tab_module.gr.Blocks():
        batched.lay_out()
    own = {"prompt": "a (red:1.4) circle :0.5 AND a star", "negative": "(blue:1.3)", "target": "Both", "name": "w_duo"}
    given = [{**QUICK, **own, "stages": True}.get(name, field.value) for name, field in batched.fields.items()]
    seen = list(batched._run(given))
    fractions = [float(step[0].split("width:")[1].split("%")[0]) for step in seen if "width:" in str(step[0])]
    assert fractions == sorted(fractions)
    assert "Write <b>w_duo-1 :0.5 AND w_duo-2</b> in your prompt." in seen[-1][3]
    assert "Write <b>w_duo-neg</b> in your negative prompt." in seen[-1][3]
    assert seen[-1][4] == "w_duo-1 :0.5 AND w_duo-2"  # what is copied and sent
    assert [(name, text) for name, _, text in batched.shell.told] == [
        ("w_duo-1", "a (red:1.4) circle"),
        ("w_duo-2", "a star"),
        ("w_duo-neg", "(blue:1.3)"),
    ]


@needs_own_page
def test_a_batch_is_interrupted_as_a_run_is(host, tmp_path) -> None:
    batched = tab_module.Tab(Batched(host, tmp_path))
    with tab_module.gr.Blocks():
        batched.lay_out()
    given = [QUICK.get(name, component.value) for name, component in batched.fields.items()]
    given[list(batched.fields).index("steps")] = 50
    for shown in batched._run_batch([None, ["dusk"], *given]):
        if "step 2 of" in str(shown[0]):
            batched._stop("save")
    assert "interrupted, the best so far is saved" in shown[3]
    assert "not started" in shown[3]
    assert [path.stem for path in tmp_path.glob("*.pt")] == ["dusk"]
    assert [name for name, _, _ in batched.shell.told] == ["dusk"]


@needs_own_page
def test_a_run_has_the_model_for_itself(host, tmp_path) -> None:
    """So that tasks of the API wait for it."""
    alone: list[bool] = []

    class Watched(Batched):
        def host(self) -> None:
            alone.append(self.model_lock.locked())
            raise RequestError("enough")

    *_, last = press(Watched(host, tmp_path), "embedding_estimate_batch_estimate", "task", None, ["dusk"])
    assert "enough" in last[3]
    assert alone == [True]
    assert not Watched.model_lock.locked()


@needs_own_page
def test_a_batch_of_nothing_and_a_wrong_one_are_said(host, tmp_path) -> None:
    *_, shown = press(Batched(host, tmp_path), "embedding_estimate_batch_estimate", "task", None, [])
    assert "Drop a file, or tick styles" in shown[3]
    (tmp_path / "list.txt").write_text("a/b\tx\nday\tx\nDay\ty\n", encoding="utf-8")
    *_, shown = press(Batched(host, tmp_path), "embedding_estimate_batch_estimate", "task", tmp_path / "list.txt", [])
    assert "line 1: " in shown[3]
    assert "<br>line 3: " in shown[3]


def test_styles_are_read_again(host, tmp_path) -> None:
    shell = Batched(host, tmp_path)
    batched = tab_module.Tab(shell)
    shell.styles = lambda: (("new", "a", ""),)
    batched.batch.styles = shell.styles
    assert batched.batch._again()["choices"] == ["new"]


def test_what_is_inside_is_shown_as_a_table(host, tmp_path) -> None:
    shell = standalone_tab.StandaloneShell.__new__(standalone_tab.StandaloneShell)
    shell.folder, shell.model = str(tmp_path), host
    with host.session() as session:
        red = session.token_vectors("red")["clip_l"]
    writing.save(Embedding("word", {"clip_l": torch.cat([red, 30 * red])}, {}), tmp_path / "word.pt")
    writing.save(Embedding("wide", {"clip_l": torch.ones(1, 5)}, {}), tmp_path / "wide.pt")
    inside = InsideTab(shell)
    with tab_module.gr.Blocks():
        inside.lay_out()
    assert [name if isinstance(name, str) else name[1] for name in inside.name.choices] == ["wide", "word"]
    table, footer = inside.look("word")
    assert table.count("<tr") == 3
    assert table.count("red <small>1.00</small>") == 2
    assert table.count("<tr class='bad'>") == 1
    assert "Far outside" in table
    assert footer == ""
    for name, said in (("wide", "another kind of model"), ("none", "no embedding"), (None, "Choose"), ("", "Choose")):
        assert said in inside.look(name)[0]
    assert not any("<b>" in inside.look("<b>x")[part] for part in (0, 1))


@pytest.fixture
def served(tmp_path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ModelOptions(model=str(SHAPES_SD), device="cpu")
    blocks = standalone_tab.launch([options], str(tmp_path), port, browser=False, wait=False)
    yield f"http://127.0.0.1:{port}"
    blocks.close()


@needs_own_page
@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="no chromium and chromedriver")
def test_in_a_browser(served, tmp_path) -> None:
    with browser.page(served) as page:
        page.fill("prompt", PROMPT)
        page.until(lambda: "3/75" in page.text("prompt_tokens"))
        page.fill("name", "inbrowser")
        page.choose("part", "U-NET")
        assert not page.all("sentence")[0].is_displayed()
        page.choose("use", "In this sentence")
        page.until(lambda: page.all("sentence")[0].is_displayed())
        page.choose("use", "As the whole prompt")
        use_few(page)

        # Interrupt (not save): nothing is left, and it is said.
        page.click("estimate")
        page.until(lambda: "Learning" in page.text("progress"))
        page.click("discard")
        page.until(lambda: "Nothing was saved" in page.text("result"))
        assert not list(tmp_path.glob("*.pt"))

        # Interrupt: the best so far is saved; the curve is there.
        page.click("estimate")
        page.until(lambda: "step 3" in page.text("progress"))
        page.until(lambda: page.element("curve", "img"))
        page.click("interrupt")
        page.until(lambda: "Saved" in page.text("progress"))
        first = reading.load(tmp_path / "inbrowser.pt")
        assert "Write inbrowser in your prompt" in page.text("result")
        assert page.element("gallery", "img")
        page.shot(tmp_path / "finished.png")

        # Overwriting is refused, then allowed; this one finishes.
        page.click("estimate")
        page.until(lambda: "exists already" in page.text("result"))
        page.tick("overwrite")
        page.choose("part", "Transformer")
        page.click("estimate")
        page.until(lambda: "Saved" in page.text("progress"))
        assert not first.vectors["clip_l"].equal(reading.load(tmp_path / "inbrowser.pt").vectors["clip_l"])

        # The new file is in the list once the folder is read again, and shows what is inside.
        page.driver.execute_script("arguments[0].querySelector('button, .label-wrap').click()", page.all("inside")[0])
        page.click("inside_refresh")
        page.pick("inside_name", "inbrowser")
        page.click("inside_show")
        page.until(lambda: "nearest words" in page.text("inside_table"))
        assert "circle" in page.text("inside_table")
        page.click("measure")
        page.until(lambda: "Measured." in page.text("progress"))
        assert "inbrowser: of what the weights change" in page.text("result")
        assert not page.complaints()


@needs_own_page
@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="no chromium and chromedriver")
def test_a_batch_in_a_browser(served, tmp_path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("day\ta (blue:1.5) square\nbroken\t(a:1.5.2)\n", encoding="utf-8")
    with browser.page(served) as page:
        page.choose("part", "Transformer")
        page.choose("use", "As the whole prompt")
        use_few(page)
        page.driver.execute_script(
            "arguments[0].querySelector('button, .label-wrap').click()", page.all("batch_fold")[0]
        )
        page.until(lambda: page.element("batch_file", "input[type=file]"))
        page.element("batch_file", "input[type=file]").send_keys(str(listed))
        page.until(lambda: "list" in page.text("batch_file"))
        page.click("batch_estimate")
        page.until(lambda: "1 made, 1 failed" in page.text("progress"))
        assert "1.5.2" in page.text("result")
        page.shot(tmp_path / "batch.png")
        assert not page.complaints()
    assert (tmp_path / "day.pt").exists()


def use_few(page: browser.Page) -> None:
    """Few sampling steps and one picture, so that a run is short."""
    for name in ("learning", "generations"):
        page.driver.execute_script("arguments[0].querySelector('button, .label-wrap').click()", page.all(name)[0])
    for name, number in (("sampling_steps", "4"), ("images", "1")):
        page.driver.execute_script(
            """
            const field = arguments[0].querySelector('input[type=number]');
            Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(field, arguments[1]);
            field.dispatchEvent(new Event('input', {bubbles: true}));
            field.dispatchEvent(new Event('blur', {bubbles: true}));
            """,
            page.all(name)[0],
            number,
        )
