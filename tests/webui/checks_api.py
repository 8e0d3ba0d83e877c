"""Checks of the HTTP API in a webui: over a real socket, of the webui's own app where there is one."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from lib_estimate.hosts.family import family
from lib_estimate.hosts.webui_shell import WebuiShell
from lib_estimate.interfaces import api
from tests.webui.runs import outcome, picture, request
from tests.webui.webuis import changed

SHORT = {
    "prompt": "a (red:1.6) circle", "part": "cross-attention", "use": "whole", "steps": 3, "sampling_steps": 4,
    "trajectories": 1, "images": 0, "seed": 1, "sentence": "a photo of {}", "width": 64, "height": 64,
    "overwrite": True, "subfolder": "",
}  # fmt: skip


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """An app of the check's own, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@contextmanager
def webui() -> Iterator[str]:
    """The webui's own app; of a stand-in, which has none, an app with the routes."""
    from modules import shared

    if getattr(shared.cmd_opts, "port", None):
        yield f"http://127.0.0.1:{shared.cmd_opts.port}"
        return
    app = FastAPI()
    api.add_routes(app, WebuiShell())
    with served(app) as url:
        yield url


def call(url: str, path: str, data: Any = None, **headers: str) -> tuple[int, Any]:
    raw = None if data is None else json.dumps(data).encode()
    given = urllib.request.Request(f"{url}{api.PREFIX}/{path}", raw, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(given, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def ended(url: str, task: str) -> dict[str, Any]:
    for _ in range(4000):
        _, seen = call(url, f"progress/{task}")
        if seen["state"] not in ("waiting", "running"):
            return seen
        time.sleep(0.05)
    raise AssertionError(seen)


def check_an_estimate_over_http() -> dict[str, Any]:
    """Waits for the webui's queue, gives what the same run gives here, and its name works at once; a measurement."""
    from modules import call_queue, progress, shared

    name, begun = "overhttp", time.monotonic()
    folder = Path(WebuiShell().embeddings_folder())
    try:
        with webui() as url:
            before = picture(name)
            with call_queue.queue_lock:  # as a generation has it
                status, task = call(url, "estimate", {**SHORT, "name": name})
                assert (status, task["fraction"]) == (200, 0.0), task
                time.sleep(0.5)
                assert call(url, f"progress/{task['id']}")[1]["state"] == "waiting"
                assert call(url, f"result/{task['id']}")[0] == 409
            seen = ended(url, task["id"])
            assert seen["state"] == "done", seen
            status, record = call(url, f"result/{task['id']}?pictures=true")
            assert (status, record["pictures"], record["written"]) == (200, [], {"prompt": name}), record
            assert Path(record["file"]).parent == folder, record["file"]
            assert (shared.state.job, progress.current_task) == ("", None)
            assert (picture(name).float() - before.float()).abs().mean().item() > 2
            alone = outcome(request(prompt=SHORT["prompt"]))
            apart = max(abs(a - b) for a, b in zip(alone.losses, record["losses"], strict=True))
            assert apart < 1e-4, (alone.losses, record["losses"])
            by = {"name": name, "prompt": SHORT["prompt"], "sampling_steps": 4, "width": 64, "height": 64}
            status, measure = call(url, "measure", {**by, "seed": 1, "images": 0, "sentence": "a photo of {}"})
            assert (status, ended(url, measure["id"])["state"]) == (200, "done")
            measured = call(url, f"result/{measure['id']}")[1]
            assert abs(measured["error"] - record["error"]) < 1e-3, (measured["error"], record["error"])
    finally:
        remove(folder, name)
    return {"seconds": time.monotonic() - begun, "error": record["error"]}


def check_interrupts_over_http_and_the_webuis_own() -> dict[str, Any]:
    """The one is told to save nothing, the other saves."""
    from modules import shared

    folder = Path(WebuiShell().embeddings_folder())
    try:
        with webui() as url:
            for name, state in (("dropped", "interrupted"), ("kept", "done")):
                given = {**SHORT, "name": name, "part": "transformer", "steps": 100_000, "patience": 0}
                _, task = call(url, "estimate", given)
                learning(url, task["id"])
                if name == "kept":
                    shared.state.interrupted = True  # as its button does
                else:
                    assert call(url, f"interrupt/{task['id']}?how=discard", {})[0] == 200
                seen = ended(url, task["id"])
                assert seen["state"] == state, seen
        assert not list(folder.glob("dropped.*"))
        assert list(folder.glob("kept.*"))
    finally:
        remove(folder, "kept")
    return {}


def learning(url: str, task: str) -> None:
    for _ in range(4000):
        seen = call(url, f"progress/{task}")[1]
        assert seen["state"] in ("waiting", "running"), seen
        if "step" in seen["words"]:
            return
        time.sleep(0.02)
    raise AssertionError(seen)


def remove(folder: Path, name: str) -> None:
    for file in folder.glob(f"{name}.*"):
        file.unlink()
    family().refresh_embeddings()


def check_what_the_api_refuses() -> dict[str, Any]:
    """A bad request by its field, whatever the webui's own handlers make of errors."""
    with webui() as url:
        for field, changes in (
            ("steps", {"steps": "many"}), ("nothing", {"nothing": 1}), ("out", {"out": "/tmp"}),
            ("continue_from", {"continue_from": "../config.json"}), ("subfolder", {"subfolder": ".."}),
        ):  # fmt: skip
            status, said = call(url, "estimate", {**SHORT, "name": "refused", **changes})
            assert (status, said["field"]) == (422, field), (field, said)
        for path, data, status in (
            ("progress/none", None, 404), ("result/none", None, 404), ("parse", {"prompt": "x" * 300_000}, 413),
        ):  # fmt: skip
            told = call(url, path, data)
            assert told[0] == status, told
            assert told[1]["detail"].endswith("."), told
    return {}


def check_a_prompt_is_read_over_http() -> dict[str, Any]:
    """Beside a run: it doesn't wait for the queue."""
    from modules import call_queue

    with call_queue.queue_lock:
        family().loaded()  # which some webuis do only when a model is needed
        with webui() as url:
            status, read = call(url, "parse", {"prompt": "a (red:1.5) circle AND a star :0.7 <lora:some:1>"})
    assert status == 200, read
    assert [part["weight"] for part in read["parts"]] == [1.0, 0.7], read
    (chunk,) = read["texts"][0]["chunks"]
    assert [(token["text"], token["weight"]) for token in chunk] == [("a", 1), ("red", 1.5), ("circle", 1)], read
    assert read["tags"] == ["<lora:some:1>"]
    assert read["notes"]
    return {}


def check_the_api_is_there_as_the_webuis_own_is() -> dict[str, Any]:
    """Only with --api, and behind its --api-auth."""
    from modules import shared

    def routes(app: FastAPI) -> list[str]:
        return [route.path for route in app.routes if api.PREFIX in route.path]

    def basic(pair: str) -> str:
        return f"Basic {base64.b64encode(pair.encode()).decode()}"

    with changed(shared.cmd_opts, "api", False):
        api.add_routes(app := FastAPI(), WebuiShell())
        assert not routes(app)
    with changed(shared.cmd_opts, "api", True), changed(shared.cmd_opts, "api_auth", "ann:one,bob:two"):
        api.add_routes(app := FastAPI(), WebuiShell())
    assert len(routes(app)) == 6, routes(app)
    with served(app) as url:
        assert call(url, "progress/none")[0] == 401
        for pair, status in (("ann:two", 401), ("ann:one", 404), ("bob:two", 404)):
            assert call(url, "progress/none", Authorization=basic(pair))[0] == status, pair
    return {}
