"""The HTTP API over a real socket, on the tab without a webui; tests/webui has what a webui adds."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from lib_estimate.errors import EstimateError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.interfaces import api, asked, cli, standalone_tab, tasks
from lib_estimate.request import EstimateRequest, ModelOptions, field_value
from tests.conftest import SHAPES_SD, run

README = Path(__file__).parents[2] / "README.md"
QUICK = {
    "prompt": "a (red:1.6) circle", "part": "transformer", "use": "whole", "steps": 2, "trajectories": 1, "images": 0,
    "sampling_steps": 2, "width": 64, "height": 64, "sentence": "a small {}",
}  # fmt: skip
OVER = ("done", "failed", "interrupted")
OWN_PAGE = int(gradio.__version__.split(".")[0]) >= 6  # an older Gradio is a webui's


@contextmanager
def served(folder: Path, accounts: api.Accounts) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ModelOptions(model=str(SHAPES_SD), device="cpu")
    if OWN_PAGE:
        blocks = standalone_tab.launch([options], str(folder), port, browser=False, accounts=accounts, wait=False)
        yield f"http://127.0.0.1:{port}"
        blocks.close()
        return
    app = FastAPI()  # the routes alone, on the FastAPI of a webui
    api.add_routes(app, standalone_tab.StandaloneShell([options], str(folder), accounts))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory) -> Path:
    """Of the embeddings; beside it is what nobody may reach."""
    outside = tmp_path_factory.mktemp("outside")
    for path in (outside / "secret.pt", outside / "embeddings" / "known.pt"):
        path.parent.mkdir(exist_ok=True)
        writing.save(Embedding(path.stem, {"clip_l": torch.ones(1, host.parts.text_encoders[0].width)}, {}), path)
    (outside / "embeddings" / "link.pt").symlink_to(outside / "secret.pt")
    (outside / "embeddings" / "way").symlink_to(outside)
    return outside / "embeddings"


@pytest.fixture(scope="module")
def url(folder) -> Iterator[str]:
    with served(folder, []) as url:
        yield url


@pytest.fixture
def call(url) -> Callable[..., tuple[int, Any]]:
    return lambda path, data=None, **more: asked_of(url, path, data, **more)


def asked_of(url: str, path: str, data: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and answer; data is sent as JSON, or as it is."""
    raw = data if data is None or isinstance(data, bytes) else json.dumps(data).encode()
    headers = {"Content-Type": "application/json"} | {name.replace("_", "-"): v for name, v in headers.items()}
    request = urllib.request.Request(f"{url}/embedding-estimate/v1/{path}", raw, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def until(call: Callable, task: str, states: tuple[str, ...] = OVER) -> dict[str, Any]:
    for _ in range(600):
        _, seen = call(f"progress/{task}")
        if seen["state"] in states:
            return seen
        time.sleep(0.05)
    raise AssertionError(seen)


# ---- tasks --------------------------------------------------------------------------------------------------------


def test_ten_clients_at_once_get_what_each_would_alone(call, folder, host) -> None:
    def client(number: int) -> tuple[dict, dict]:
        text = f"a (red:1.{number}1) circle" if number < 3 else f"a {'very ' * number}red circle"  # nothing to learn
        given = {**QUICK, "name": f"one-of-ten-{number}", "prompt": text, "images": int(number == 1)}
        status, begun = call("estimate", given)
        assert (status, begun["state"]) in ((200, "waiting"), (200, "running"))
        seen = until(call, begun["id"])
        assert (seen["state"], seen["fraction"], seen["seconds_left"]) == ("done", 1.0, None)
        return given, call(f"result/{begun['id']}?pictures=true")[1]

    with ThreadPoolExecutor(10) as clients:
        results = list(clients.map(client, range(10)))
    for number, (given, record) in enumerate(results):
        assert record["name"] == given["name"]
        assert record["settings"]["prompt"] == given["prompt"]
        assert record["written"] == {"prompt": given["name"]}
        assert (folder / f"{given['name']}.pt").exists()
        assert bool(record["pictures"]) == (number == 1)
    pictures = results[1][1]["pictures"]
    assert [shown["title"] for shown in pictures[:2]] == ["prompt", "one-of-ten-1"]
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0]["png"]))).size == (64, 64)
    for given, record in (results[2], results[7]):
        fields = {name: field_value(name, value) for name, value in given.items()}
        alone = run(EstimateRequest(**{**fields, "name": "alone", "out": str(folder), "overwrite": True}), host)
        assert alone.losses == record["losses"]
        made = reading.load(folder / f"{given['name']}.pt")
        assert torch.equal(made.vectors["clip_l"], alone.embedding.vectors["clip_l"])


def test_a_task_is_interrupted_with_and_without_saving_and_before_it_begins(call, folder) -> None:
    long = {**QUICK, "steps": 100_000, "patience": 0}
    (_, saved), (_, dropped), (_, waiting) = (
        call("estimate", {**long, "name": name}) for name in ("kept-best", "dropped", "never-begun")
    )
    assert waiting["before"] == 2
    assert call(f"interrupt/{waiting['id']}?how=discard", b"")[1]["state"] == "interrupted"
    for task in (saved, dropped):
        until(call, task["id"], ("running",))
        while "step" not in call(f"progress/{task['id']}")[1]["words"]:
            time.sleep(0.02)
        status, said = call(f"result/{task['id']}")
        assert (status, said["state"]) == (409, "running")
        assert call(f"interrupt/{task['id']}" + ("?how=discard" if task is dropped else ""), b"")[0] == 200
    assert until(call, saved["id"])["state"] == "done"
    assert call(f"result/{saved['id']}")[1]["stopped"] == "interrupted"
    assert until(call, dropped["id"])["state"] == "interrupted"
    for task in (dropped, waiting):
        status, said = call(f"result/{task['id']}")
        assert (status, said["state"]) == (422, "interrupted")
        assert "Nothing was saved" in said["detail"]
        assert call(f"interrupt/{task['id']}", b"")[0] == 409
    assert [path.stem for path in folder.glob("*.pt") if path.stem in ("kept-best", "dropped", "never-begun")] == [
        "kept-best"
    ]


def test_what_goes_wrong_in_a_task_is_its_sentence(call) -> None:
    _, task = call("estimate", {**QUICK, "name": "lora", "take_over_lora": True})
    seen = until(call, task["id"])
    assert seen["state"] == "failed"
    assert seen["words"].endswith("leave take_over_lora out.")
    status, said = call(f"result/{task['id']}")
    assert (status, said["state"], said["detail"]) == (422, "failed", seen["words"])


def test_an_embedding_is_measured_as_at_the_end_of_its_estimate(call) -> None:
    _, task = call("estimate", {**QUICK, "name": "to_measure"})
    until(call, task["id"])
    record = call(f"result/{task['id']}")[1]
    by = {name: QUICK[name] for name in ("prompt", "sampling_steps", "width", "height", "sentence", "images")}
    for name in ("to_measure", "to_measure.pt"):
        _, task = call("measure", {**by, "name": name})
        assert until(call, task["id"])["state"] == "done"
        measured = call(f"result/{task['id']}")[1]
        assert measured["name"] == "to_measure"
        assert measured["error"] == pytest.approx(record["error"], rel=1e-4)


def test_a_prompt_is_read(call) -> None:
    status, read = call("parse", {"prompt": "a (red:1.5) known [cat:dog:0.5] AND a star :0.7"})
    assert status == 200
    cat, dog = ({"until": end, "text": f"a (red:1.5) known {text}"} for end, text in ((10, "cat"), (20, "dog")))
    star = {"until": 20, "text": " a star"}
    assert read["parts"] == [{"weight": 1.0, "texts": [cat, dog]}, {"weight": 0.7, "texts": [star]}]
    (chunk,) = read["texts"][0]["chunks"]
    assert [(token["text"], token["weight"]) for token in chunk][:3] == [("a", 1.0), ("red", 1.5), ("known", 1.0)]
    assert [token["vectors"] for token in chunk][2] == 1
    assert call("parse", {"prompt": "a (b:1.5.2) c"})[0] == 422


def test_the_tab_and_the_api_wait_for_each_other(call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "MOST_WAITING", 0)
        assert call("estimate", {**QUICK, "name": "too-many"})[0] == 429
    with standalone_tab.StandaloneShell.model_lock:  # as a run of the tab has it
        _, task = call("estimate", {**QUICK, "name": "waited", "prompt": "a red circle"})
        time.sleep(0.5)
        assert call(f"progress/{task['id']}")[1]["state"] == "waiting"
    assert until(call, task["id"])["state"] == "done"


def test_only_the_last_tasks_are_remembered_and_only_so_many_wait(monkeypatch) -> None:
    monkeypatch.setattr(tasks, "KEPT", 3)
    monkeypatch.setattr(tasks, "MOST_WAITING", 4)
    queue, begun = tasks.Tasks(standalone_tab.StandaloneShell.turn.__get__(standalone_tab.StandaloneShell)), []

    def work(cancel: Any) -> Iterator[tasks.Result]:
        begun.append(cancel)
        yield tasks.Result({}, [("large", bytes(100))], ())

    with standalone_tab.StandaloneShell.model_lock:
        added = [queue.add(work) for _ in range(4)]
        with pytest.raises(tasks.TooMany, match="4 tasks are waiting"):
            queue.add(work)
    queue.worker.join(10)
    assert queue.worker is None
    assert [task.cancel for task in added] == begun  # in order
    assert [queue.find(task.id) for task in added] == [None, *added[1:]]
    monkeypatch.setattr(tasks, "KEPT_BYTES", 150)
    queue.add(work)
    queue.worker.join(10)
    assert len(queue.known) == 1


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("steps", {"steps": "many"}),
        ("steps", {"steps": 1.5}),
        ("steps", {"steps": True}),
        ("steps", {"steps": -1}),
        ("seed", {"seed": 2**32}),
        ("cfg_scale", {"cfg_scale": 1e999}),
        ("tolerance", {"tolerance": float("nan")}),
        ("part", {"part": "whatever"}),
        ("part", {"part": None}),
        ("schedule", {"schedule": "whatever"}),
        ("learning_rate", {"learning_rate": "fast"}),
        ("vectors", {"vectors": "many"}),
        ("vectors", {"vectors": 0}),
        ("overwrite", {"overwrite": "yes"}),
        ("negative", {"negative": 5}),
        ("sentence", {"sentence": [1]}),
        ("sentence", {"use": "sentence", "sentence": []}),
        ("beside", {"beside": [[["deep"]]]}),
        ("steps", {"steps": {"of": "these"}}),
        ("prompt", {"prompt": "  "}),
        ("prompt", {"prompt": "half of a pair: \ud800"}),
        ("name", {"name": ""}),
        ("name", {"name": "a/b"}),
        ("name", {"name": "known"}),
        ("unknown", {"unknown": 1}),
        ("out", {"out": "."}),
        ("subfolder", {"subfolder": "../up"}),
        ("subfolder", {"subfolder": "/tmp"}),
        ("subfolder", {"subfolder": "way"}),
        ("subfolder", {"subfolder": "a\0b"}),
        ("name", {"name": "link", "overwrite": True}),
        *(
            ("continue_from", {"continue_from": path})
            for path in (
                "/etc/passwd", "../secret.pt", "known/../../secret.pt", "..\\secret.pt", "C:\\secret.pt", "~/secret.pt",
                "link", "link.pt", "way/secret.pt", "way", "none", "a\0b",
            )
        ),
    ],
)  # fmt: skip
def test_a_bad_request_is_refused_by_the_field(call, field, changes) -> None:
    status, said = call("estimate", {**QUICK, "name": "refused", **changes})
    assert (status, said.get("field")) == (422, field), said
    assert said["detail"].endswith(".")
    assert "--" not in said["detail"]


def test_bodies_that_are_no_request_are_refused(call) -> None:
    for raw in (b"", b"{", b"[]", b"5", b"\xff", b"[" * 100_000, b'{"steps": ' + b"9" * 10_000 + b"}"):
        status, said = call("estimate", raw)
        assert status == 422, raw[:20]
        assert "Traceback" not in said["detail"]
    assert call("estimate", b'{"prompt": "' + b"x" * 300_000 + b'"}')[0] == 413
    assert call("estimate", {**QUICK, "name": "plain"}, Content_Type="text/plain")[0] == 415
    for field, given in (("prompt", {}), ("steps", {"prompt": "a", "steps": 0}), ("x", {"prompt": "a", "x": 1})):
        status, said = call("parse", given)
        assert (status, said["field"]) == (422, field)
    for field, given in (("name", {}), ("name", {"name": "none"}), ("name", {"name": "../secret.pt"}), ("part", QUICK)):
        status, said = call("measure", {"prompt": "a", **given})
        assert (status, said["field"]) == (422, field), said


def test_of_a_task_that_is_not_there_nothing_is_known(call) -> None:
    for path, data in (("progress/none", None), ("result/none", None), ("interrupt/none", b"")):
        assert call(path, data)[0] == 404
    assert call("interrupt/none?how=else", b"")[1]["field"] == "how"


def test_it_is_for_those_with_a_password(tmp_path) -> None:
    def basic(pair: str) -> str:
        return "Basic " + base64.b64encode(pair.encode()).decode()

    accounts = api.read_accounts("ann:one,bob:two:2")
    with served(tmp_path, accounts) as url:
        assert asked_of(url, "progress/none")[0] == 401
        assert asked_of(url, "estimate", {**QUICK, "name": "x"})[0] == 401
        for wrong in (*map(basic, ("ann:two", "ann:", ":", "bob:one", "ann:one\N{SNOWMAN}")), "Basic %", "Bearer x"):
            assert asked_of(url, "progress/none", Authorization=wrong)[0] == 401
        for right in ("ann:one", "bob:two:2"):
            assert asked_of(url, "progress/none", Authorization=basic(right))[0] == 404
    for wrong in ("ann", "ann:", ":one"):
        with pytest.raises(EstimateError, match="user:password"):
            api.read_accounts(wrong)


def test_without_the_flag_there_is_no_route(tmp_path, monkeypatch, capsys) -> None:
    app = FastAPI()
    shell = standalone_tab.StandaloneShell.__new__(standalone_tab.StandaloneShell)
    api.add_routes(app, shell)
    assert not [route for route in app.routes if "embedding-estimate" in route.path]
    given: list[api.Accounts] = []
    monkeypatch.setattr(standalone_tab, "launch", lambda *_, accounts, **__: given.append(accounts))
    assert [cli.main(["ui", *flags]) for flags in ([], ["--api"], ["--api", "--api-auth", "a:b"])] == [0, 0, 0]
    assert given == [None, [], [("a", "b")]]
    assert cli.main(["ui", "--api-auth", "a:b"]) == 1
    assert "give --api, too" in capsys.readouterr().err


def test_the_schema_is_made_of_the_request(url) -> None:
    with urllib.request.urlopen(f"{url}/openapi.json") as answer:
        paths = json.load(answer)["paths"]
    fields = _schema_of(paths, "estimate")["properties"]
    assert set(fields) == {item.name for item in dataclasses.fields(EstimateRequest)} - {"out"}
    for item in dataclasses.fields(EstimateRequest):
        if item.name != "out":
            default = fields[item.name]["default"]
            made = EstimateRequest(**{item.name: field_value(item.name, default)})
            assert made == EstimateRequest()
            assert fields[item.name]["description"] == asked.in_the_api(item.metadata["help"])
    assert fields["steps"] | {"description": ""} == {
        "type": "integer", "minimum": 0, "maximum": 100_000, "default": 0, "description": "",
    }  # fmt: skip
    assert fields["part"]["enum"] == ["auto", "cross-attention", "unet", "transformer"]
    assert fields["cfg_scale"]["type"] == "number"
    assert _schema_of(paths, "measure")["properties"].keys() == set(asked.MEASURE)
    assert "prompt" in _schema_of(paths, "parse")["required"]


def _schema_of(paths: dict, name: str) -> dict[str, Any]:
    post = paths[f"{api.PREFIX}/{name}"]["post"]
    return post["requestBody"]["content"]["application/json"]["schema"]


def test_the_client_in_the_readme_works(url, folder) -> None:
    _, _, section = README.read_text(encoding="utf-8").partition("### HTTP API")
    client = re.search("```python\n(.*?)```", section, re.DOTALL)[1]
    quick = {name: value for name, value in QUICK.items() if name != "prompt"}
    written = '"name": "by_api"'
    assert written in client
    client = client.replace("http://127.0.0.1:7865", url).replace(written, f"{written}, **{quick!r}")
    done = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(folder / "by_api.pt") in done.stdout
