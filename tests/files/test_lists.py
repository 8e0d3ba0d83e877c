"""Lists of requests, as people and webuis write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lib_estimate.errors import EmbeddingFileError, RequestError
from lib_estimate.files import lists
from lib_estimate.files.names import check_name, cleaned
from lib_estimate.request import Effort, EstimateRequest, Target, Use

COMMON = EstimateRequest(effort=Effort.QUICK, use=Use.WHOLE)
STYLES = (
    b"\xef\xbb\xbfname,prompt,negative_prompt\r\n"
    b"# a comment,x,y\r\n"
    b'day, "a (red:1.4) circle, {prompt}","blurry, (text:1.3)"\r\n'
    b'"two\tlines: (v2)","a circle\r\na square",\r\n'
    b"----- STYLES -----,,\r\n"
    b"bad,,ugly\r\n"
)


def write(tmp_path: Path, name: str, content: bytes | str) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def told(lines: list[lists.Line]) -> list[tuple]:
    return [(x.place, x.request.name, x.request.target.value, x.request.prompt, x.request.negative) for x in lines]


def test_a_webuis_styles_are_read_as_the_webui_reads_them(tmp_path) -> None:
    lines, notes = lists.read(write(tmp_path, "styles.csv", STYLES), COMMON)
    assert told(lines) == [
        ("line 3", "day", "prompt", "a (red:1.4) circle", "blurry, (text:1.3)"),
        ("line 3", "day-neg", "negative", "a (red:1.4) circle", "blurry, (text:1.3)"),
        ("line 4", "two-lines-v2", "prompt", "a circle\r\na square", ""),
        ("line 7", "bad", "negative", "", "ugly"),
    ]
    assert {line.request.effort for line in lines} == {Effort.QUICK}
    assert any('"two-lines-v2"' in note and "line 4" in note for note in notes)
    assert sum("{prompt}" in note for note in notes) == 1


def test_styles_of_the_old_kind_are_read(tmp_path) -> None:
    lines, _ = lists.read(write(tmp_path, "old.csv", "name,text\nday,a circle\n"), COMMON)
    assert told(lines) == [("line 2", "day", "prompt", "a circle", "")]


def test_a_webuis_own_writer_is_read_back(tmp_path) -> None:
    """As `StyleDatabase.save_styles` writes: BOM, all fields quoted where needed."""
    import csv

    path = tmp_path / "styles.csv"
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["name", "prompt", "negative_prompt"])
        writer.writeheader()
        writer.writerow({"name": "日", "prompt": 'a "quoted", word', "negative_prompt": None})
    assert told(lists.read(path, COMMON)[0]) == [("line 2", "日", "prompt", 'a "quoted", word', "")]


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("masterpiece, {prompt}", "masterpiece"),
        ("{prompt}, oil on canvas", "oil on canvas"),
        ("photo, {prompt}, (sharp:1.2)", "photo, (sharp:1.2)"),
        ("cinematic still {prompt} . emotional, vignette", "cinematic still . emotional, vignette"),
        ("({prompt}:1.2), film grain", "film grain"),
        (" a circle ", "a circle"),
    ],
)
def test_the_place_of_the_users_prompt_is_closed(style, text) -> None:
    assert lists.without_hole(style) == text


@pytest.mark.parametrize(
    ("style", "sentence"),
    [("masterpiece, {prompt}", "{}, a cat"), ("{prompt}, oil on canvas", "a cat, {}"), ("sharp", "a cat, {}")],
)
def test_in_a_sentence_the_word_stands_where_the_styles_text_stood(style, sentence) -> None:
    common = EstimateRequest(prompt="a cat", use=Use.SENTENCE)
    (line, beside), _ = lists.of_styles([lists.Style("line 2", "day", style, "ugly")], common)
    assert line.request.sentence == (sentence,)
    assert beside.request.use is Use.WHOLE
    assert "a cat" in beside.request.prompt or "{prompt}" not in style
    own = EstimateRequest(prompt="a cat", use=Use.SENTENCE, sentence=("{} at night",))
    (line, _), _ = lists.of_styles([lists.Style("line 2", "day", style, "ugly")], own)
    assert line.request.sentence == ("{} at night",)
    with pytest.raises(RequestError, match="--prompt"):
        lists.of_styles([lists.Style("line 2", "day", style, "")], EstimateRequest(use=Use.SENTENCE))


def test_a_style_of_both_makes_both_at_once() -> None:
    common = EstimateRequest(target=Target.BOTH)
    styles = [lists.Style("line 2", "day", "a circle", "ugly"), lists.Style("line 3", "dusk", "a star", "")]
    assert told(lists.of_styles([*styles, lists.Style("line 4", "bad", "", "ugly")], common)[0]) == [
        ("line 2", "day", "both", "a circle", "ugly"),
        ("line 3", "dusk", "prompt", "a star", ""),
        ("line 4", "bad", "negative", "", "ugly"),
    ]


def test_text_with_names_and_prompts(tmp_path) -> None:
    text = "# names\n\nday\ta (red:1.4) circle\n  night \t a {blue}\tcircle \n"
    lines, notes = lists.read(write(tmp_path, "list.txt", text), COMMON)
    assert told(lines) == [
        ("line 3", "day", "prompt", "a (red:1.4) circle", ""),
        ("line 4", "night", "prompt", "a {blue}\tcircle", ""),
    ]
    assert notes == []
    negative = EstimateRequest(prompt="a cat", target=Target.NEGATIVE)
    (first, _), _ = lists.read(tmp_path / "list.txt", negative)
    assert (first.request.prompt, first.request.negative) == ("a cat", "a (red:1.4) circle")


def test_json_requests_have_the_fields_of_a_request(tmp_path) -> None:
    entries = [
        {"name": "day", "prompt": "a circle", "effort": "best", "sentence": "a {}", "width": 64},
        {"name": "neg", "target": "negative", "negative": "ugly", "sentence": ["{} a", "{} b"]},
    ]
    (day, neg), _ = lists.read(write(tmp_path, "list.json", json.dumps(entries)), COMMON)
    assert (day.place, day.request.effort, day.request.sentence) == ("entry 1", Effort.BEST, ("a {}",))
    assert (day.request.width, day.request.use) == (64, Use.WHOLE)
    assert (neg.request.target, neg.request.sentence) == (Target.NEGATIVE, ("{} a", "{} b"))
    recorded = json.dumps([day.request.record()])
    assert lists.read(write(tmp_path, "again.json", recorded), EstimateRequest())[0][0].request == day.request


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "a,b\n1,2\n", "name,prompt,negative_prompt"),
        ("a.csv", "name,prompt\n", "no prompts"),
        ("a.txt", "# nothing\n", "no prompts"),
        ("a.txt", "day a circle\n", "line 1"),
        ("a.txt", b"\xff\xfe\x00", "UTF-8"),
        ("a.json", "{", "no JSON"),
        ("a.json", "{}", "list"),
        ("a.json", "[1]", "entry 1"),
        ("a.json", '[{"name": "a"}, {"promt": "x"}]', "entry 2"),
        ("a.json", '[{"prompt": 5}]', "prompt is 5"),
        ("a.json", '[{"overwrite": "yes"}]', "true or false"),
        ("a.json", '[{"effort": "much"}]', "choose one of quick"),
        ("a.json", '[{"sentence": [1]}]', "sentence"),
    ],
)
def test_what_is_wrong_with_a_list_is_said(name, content, words, tmp_path) -> None:
    with pytest.raises(RequestError, match=words):
        lists.read(write(tmp_path, name, content), COMMON)


def test_a_missing_list_is_said(tmp_path) -> None:
    with pytest.raises(RequestError, match="can't be read"):
        lists.read(tmp_path / "none.csv", COMMON)


@pytest.mark.parametrize(
    ("name", "usable"),
    [
        ("anime/one: (v2)", "anime-one-v2"),
        ("Base | Sharp, #1", "Base-Sharp-1"),
        ("..hidden.", "hidden"),
        ("black AND white", "black and white"),
        ("con", "style-con"),
        ("photo.png", "photo-png"),
        ("x" * 300, "x" * 120),
        ("日本/風", "日本-風"),
    ],
)
def test_a_cleaned_name_can_be_used(name, usable) -> None:
    with pytest.raises(EmbeddingFileError):
        check_name(name)
    assert cleaned(name) == usable == check_name(usable)


def test_a_name_of_nothing_usable_stays_empty() -> None:
    assert cleaned("()//") == ""
