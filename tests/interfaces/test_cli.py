"""The command line, as a person or a script meets it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts import standalone
from lib_estimate.interfaces import cli
from lib_estimate.request import EstimateRequest, ModelOptions
from tests.conftest import SHAPES_SD

MODEL = ["--model", str(SHAPES_SD)]
GENERATION = ["--sampling-steps", "6", "--images", "1", "--sentence", "a small {}"]
QUICK = [*MODEL, *GENERATION, "--part", "unet", "--steps", "3", "--trajectories", "1"]


@pytest.fixture(autouse=True)
def _one_loaded_model(host, monkeypatch):
    """The commands load the model the tests have loaded already."""
    monkeypatch.setattr(standalone.checkpoint, "load", lambda path, dtype, real=standalone.checkpoint.load: (
        host.parts if path == SHAPES_SD else real(path, dtype)))  # fmt: skip


def fit(tmp_path, *more: str, prompt: str = "a (red:1.6) circle", name: str = "word") -> int:
    return cli.main(["fit", prompt, "--name", name, "--out", str(tmp_path / "out"), *QUICK, *more])


def sentence(capsys) -> str:
    """The one line of complaint on stderr."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_fit_leaves_a_file_and_tells_all(tmp_path, capsys) -> None:
    assert fit(tmp_path, "--json", "-", "--sheet", str(tmp_path / "sheet.png")) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    wanted = {
        "name", "file", "format", "prompt", "vectors", "part", "steps_run", "seconds", "losses", "error",
        "unweighted_error", "recovered", "sentence_error", "pixel_difference", "seed", "model", "settings",
    }  # fmt: skip
    assert wanted <= set(record)
    assert record["steps_run"] == len(record["losses"]) == 3
    assert reading.load(tmp_path / "out" / "word.pt").vectors["clip_l"].shape[0] == record["vectors"] == 3
    assert "emphasis" in printed.err
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_fit_writes_json_to_a_file_and_safetensors(tmp_path) -> None:
    assert fit(tmp_path, "--json", str(tmp_path / "r.json"), "--format", "safetensors") == 0
    assert json.loads((tmp_path / "r.json").read_text())["file"].endswith("word.safetensors")


def test_measure_agrees_with_fit(tmp_path, capsys) -> None:
    fit(tmp_path, "--json", str(tmp_path / "r.json"))
    fitted = json.loads((tmp_path / "r.json").read_text())
    printed = capsys.readouterr()  # results on stdout, the rest on stderr, and no bar where nobody sees it move
    assert printed.out.startswith(f"Saved {tmp_path / 'out' / 'word.pt'}\n")
    assert "It cost as much as " in printed.out
    assert "Write in your prompt: word" in printed.out
    assert not any(word in printed.err for word in ("Saved", "%|"))
    more = [*MODEL, *GENERATION, "--json", "-"]
    assert cli.main(["measure", str(tmp_path / "out" / "word.pt"), "a (red:1.6) circle", *more]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["error"] == pytest.approx(fitted["error"], rel=1e-3)
    assert measured["sentence_error"]["median"] == pytest.approx(fitted["sentence_error"]["median"], rel=1e-3)
    assert measured["unweighted_error"] == pytest.approx(fitted["unweighted_error"], rel=1e-3)


def test_measure_on_several_models_has_a_line_and_a_row_of_pictures_for_each(tmp_path, relatives, capsys) -> None:
    fit(tmp_path)
    capsys.readouterr()
    models = ["--model", str(SHAPES_SD), "--model", relatives[1].options.model]
    more = [*models, *GENERATION, "--json", "-", "--sheet", str(tmp_path / "sheet.png")]
    assert cli.main(["measure", str(tmp_path / "out" / "word.pt"), "a (red:1.6) circle", *more]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [row["name"] for row in record["checkpoints"]] == ["shapes_sd", "dusk"]
    errors = [row["error"] for row in record["checkpoints"]]
    assert record["error"] == errors[0] != errors[1]
    for row in record["checkpoints"]:
        assert f"On {row['name']}: picture error " in printed.err
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.height > 2 * 160 > sheet.width / 3


def test_a_model_given_twice_is_refused(tmp_path, capsys) -> None:
    assert fit(tmp_path, *MODEL) == 1
    assert "is given twice" in sentence(capsys)


def test_parse_prints_a_table(capsys) -> None:
    assert cli.main(["parse", "a (red:1.6) circle", "[a:b:0.5]"]) == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert "1.6" in out
    assert "until step 10: a" in out


def test_parse_json_has_the_errors_too(capsys) -> None:
    assert cli.main(["parse", "cat", "(a:1.5.2)", "--steps", "8", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {
        "prompt": "cat", "attention": [["cat", 1.0]], "schedule_8": [[8, "cat"]], "and": [["cat", 1.0]],
        "token_count": 1, "chunks": [{"tokens": [49406, 2368], "weights": [1.0, 1.0]}],
    }  # fmt: skip
    assert set(rows[1]) == {"prompt", "error"}


def test_inspect_shows_what_a_file_holds(tmp_path, capsys) -> None:
    fit(tmp_path)
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "out" / "word.pt"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["vectors"]["clip_l"]["vectors"] == 3
    assert record["metadata"]["prompt"] == "a (red:1.6) circle"
    assert cli.main(["inspect", str(tmp_path / "out" / "word.pt")]) == 0
    assert "a (red:1.6) circle" in capsys.readouterr().out


def test_inspect_without_a_model_shows_lengths_and_says_what_it_cannot(tmp_path, capsys) -> None:
    torch.save({"<theirs>": torch.tensor([[3.0, 4.0]])}, tmp_path / "theirs.bin")
    assert cli.main(["inspect", str(tmp_path / "theirs.bin")]) == 0
    out = capsys.readouterr().out
    assert "length 5.000" in out
    assert "only a model knows" in out


def test_inspect_with_a_model_shows_the_nearest_words_and_warns(tmp_path, host, capsys) -> None:
    with host.session() as session:
        red = session.token_vectors("red")["clip_l"]
    writing.save(Embedding("word", {"clip_l": torch.cat([red, 30 * red])}, {}), tmp_path / "word.pt")
    assert cli.main(["inspect", str(tmp_path / "word.pt"), *MODEL]) == 0
    out = capsys.readouterr().out
    assert out.count("red 1.00") == 2
    assert "warning: Far outside what words are: vector 2; " in out
    assert cli.main(["inspect", str(tmp_path / "word.pt"), *MODEL, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["vectors"]["clip_l"]["rows"]
    assert [row["far"] for row in rows] == [False, True]
    assert rows[0]["words"][0][0] == "red"


def test_inspect_refuses_a_model_of_other_widths(tmp_path, capsys) -> None:
    torch.save({"<theirs>": torch.ones(1, 5)}, tmp_path / "theirs.bin")
    assert cli.main(["inspect", str(tmp_path / "theirs.bin"), *MODEL]) != 0
    assert "made for another kind of model" in sentence(capsys)


def test_continue_is_a_flag(tmp_path, capsys) -> None:
    assert fit(tmp_path, "--width", "64", "--height", "64") == 0
    more = ["--continue", "word", "--width", "64", "--height", "64", "--json", "-"]
    capsys.readouterr()
    assert fit(tmp_path, *more, name="more") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["step"], record["continued_from"]["name"]) == (6, "word")


def test_what_cannot_be_continued_is_said_before_the_model_is_loaded(tmp_path, capsys) -> None:
    assert fit(tmp_path, "--continue", "nothing", "--model", "nowhere") != 0
    assert "no embedding 'nothing'" in sentence(capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--name", ""], "name"),
        (["--name", "a/b"], "name"),
        (["--vectors", "500"], "vectors"),
        (["--vectors", "some"], "vectors"),
        (["--steps", "-1"], "steps"),
        (["--lr", "fast"], "fast"),
        (["--width", "100"], "width"),
        (["--target", "negative"], "negative prompt is empty"),
        (["--model", "nowhere.safetensors"], "no model"),
        (["--part", "transformer", "--negative", "x"], None),
        (["--device", "cuda:99"], "device"),
        (["--use", "sentence", "--sentence", "no place"], "{}"),
    ],
)
def test_bad_input_is_one_clear_sentence(more, words, tmp_path, capsys) -> None:
    status = fit(tmp_path, *more)
    if words is None:
        assert status == 0
        return
    assert status != 0
    assert words in sentence(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [["--optimizer", "Magic"], ["--part", "x"], ["--steps", "ten"], ["--bogus"]])
def test_bad_flags_are_one_sentence(more, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        fit(tmp_path, *more)
    assert stop.value.code == 2
    assert "--help" in sentence(capsys)


@pytest.mark.parametrize("prompt", ["", "  ", "(a:1.5.2)", "a (red:1.5) circle AND [a:b:1e999]"])
def test_bad_prompts_are_one_sentence(prompt, tmp_path, capsys) -> None:
    assert fit(tmp_path, prompt=prompt) != 0
    assert len(sentence(capsys)) > 20


def test_an_existing_file_is_untouched(tmp_path, capsys) -> None:
    fit(tmp_path)
    path = tmp_path / "out" / "word.pt"
    before = (path.read_bytes(), path.stat().st_mtime_ns)
    assert fit(tmp_path, "--seed", "4") != 0
    assert "--overwrite" in sentence(capsys)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert fit(tmp_path, "--seed", "4", "--overwrite") == 0
    assert path.read_bytes() != before[0]


@pytest.mark.parametrize(("content", "words"), [(b"", "safetensors"), (b"not a checkpoint at all", "safetensors")])
def test_a_broken_checkpoint_is_said(content, words, tmp_path, capsys) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(content)
    assert fit(tmp_path, "--model", str(broken)) != 0
    assert words in sentence(capsys)
    assert broken.read_bytes() == content


def test_a_ckpt_with_code_is_refused(tmp_path, capsys) -> None:
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"state_dict": Code()}, tmp_path / "evil.ckpt")
    assert fit(tmp_path, "--model", str(tmp_path / "evil.ckpt")) != 0
    assert "safetensors" in sentence(capsys)
    assert not (tmp_path / "ran").exists()


def test_every_parameter_has_its_flag() -> None:
    """The command line is made from the request: names, defaults, choices."""
    parser = next(a for a in cli._parser()._actions if a.dest == "command").choices["fit"]
    actions = {action.dest: action for action in parser._actions}
    for source in (EstimateRequest, ModelOptions):
        for item in dataclasses.fields(source):
            assert item.name in actions, item.name
            if item.name not in ("prompt", "name", "model", "sentence", "beside"):
                assert actions[item.name].default == getattr(item.default, "value", item.default), item.name


def test_inspect_prints_nothing_that_steers_the_terminal(tmp_path, capsys) -> None:
    content = {"string_to_param": {"*": torch.ones(1, 4)}, "name": "\x1b[2J half \ud83d"}
    torch.save(content, tmp_path / "theirs.pt")
    assert cli.main(["inspect", str(tmp_path / "theirs.pt")]) == 0
    assert "\x1b" not in (out := capsys.readouterr().out)
    assert "[2J half" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], "embedding-estimate "),
        (["--help"], "COMMAND"),
        (["parse", "a (red:1.5) circle", "[" * 10_000 + "a" + "]" * 10_000], "red"),
        (["fit", "", "--name", "x"], "The prompt is empty"),
        (["fit", "x" * 30_000, "--name", "x"], "30000 characters"),
        (["fit", "x", "--name", ""], "has no name"),
        (["fit", "x", "--name", "taken"], "exists already"),
        (["fit", "x", "--name", "x", "--steps", "-1"], "steps is -1"),
        (["measure", "none.pt", ""], "The prompt is empty"),
        (["batch", "none.csv"], "can't be read"),
    ],
)
def test_what_needs_no_model_does_not_wait_for_torch(arguments, words, tmp_path) -> None:
    """In a process of its own, where torch, transformers and diffusers can't be imported at all."""
    (tmp_path / "taken.pt").write_bytes(b"theirs")
    none = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'diffusers', 'safetensors')))"
    program = f"{none}; from lib_estimate.interfaces.cli import main; sys.exit(main())"
    if arguments[0] in ("fit", "measure", "batch"):
        arguments = [*arguments, "--model", "none", *(["--out", str(tmp_path)] if arguments[0] == "fit" else [])]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert words in done.stdout + done.stderr


def test_it_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "lib_estimate", "parse", "cat", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)[0]["token_count"] == 1
