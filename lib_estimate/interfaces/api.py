"""The HTTP API, for whatever program it stands in: routes over its app, and what they answer.

One code for the FastAPI of A1111 (0.94, over pydantic 1) and today's, so bodies are read here and no models are
declared. FastAPI looks at annotations, so they are no texts in this file.
"""

import base64
import functools
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from secrets import compare_digest
from typing import Any, Protocol

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPBasic, HTTPBasicCredentials

from lib_estimate.errors import EstimateError, RequestError
from lib_estimate.files import reading
from lib_estimate.hosts.base import PromptPart, Token
from lib_estimate.interfaces import asked
from lib_estimate.interfaces.pictures import cards, gallery
from lib_estimate.interfaces.shell import Shell, taken_in
from lib_estimate.interfaces.tasks import Result, Task, Tasks, TooMany, Work
from lib_estimate.interfaces.view import View, measuring, views
from lib_estimate.measuring import measurement
from lib_estimate.progress import Cancel, Interrupted
from lib_estimate.request import EstimateRequest

log = logging.getLogger(__name__)

PREFIX = "/embedding-estimate/v1"
MOST_KB = 256  # of a body
MOST_BYTES = MOST_KB << 10
MOST_THROWN_AWAY = 64 * MOST_BYTES  # so that whoever sends a longer one hears why it was refused
LONGEST_SENTENCE = 2000  # it may quote what was sent
WAYS = ("save", "discard")
Accounts = Sequence[tuple[str, str]] | None


class Reader(Protocol):
    """How the program reads prompts; see `hosts.base.Session`."""

    def tags(self, prompt: str) -> tuple[str, list[str]]: ...
    def read(self, prompt: str, steps: int, *, negative: bool = False) -> list[PromptPart]: ...
    def tokens(self, text: str) -> list[list[Token]]: ...
    def notes(self, prompt: str) -> list[str]: ...


class Program(Shell, Protocol):
    """The program the API stands in."""

    def accounts(self) -> Accounts:
        """User and password of whoever may use the API, nobody: everyone may. None: there is to be none."""

    def reader(self) -> AbstractContextManager[Reader]:
        """Reads prompts, beside a run or not; EstimateError where no model is loaded."""


class Refused(Exception):
    """Anything but a wrong field, with its status."""

    def __init__(self, status: int, sentence: str, **more: Any) -> None:
        super().__init__(sentence)
        self.status, self.more = status, more


def add_routes(app: FastAPI, program: Program) -> None:
    """Adds the routes to a program's app, where it is to have them."""
    accounts = program.accounts()
    if accounts is None:
        return
    api = Api(program)
    start = program.start_values()
    bodies = {
        api.estimate: asked.estimate_schema(start), api.measure: asked.measure_schema(),
        api.parse: asked.parse_schema(),
    }  # fmt: skip
    for method, path, endpoint in (
        ("POST", "/estimate", api.estimate),
        ("POST", "/measure", api.measure),
        ("POST", "/parse", api.parse),
        ("GET", "/progress/{task}", api.progress),
        ("POST", "/interrupt/{task}", api.interrupt),
        ("GET", "/result/{task}", api.result),
    ):
        more: dict[str, Any] = {}
        if endpoint in bodies:
            content = {"application/json": {"schema": bodies[endpoint]}}
            more["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
        app.add_api_route(
            PREFIX + path, endpoint, methods=[method], response_model=None, tags=["Embedding Estimate"],
            dependencies=[Depends(_guard(accounts))] if accounts else [], **more,
        )  # fmt: skip


def read_accounts(given: str | None) -> list[tuple[str, str]]:
    """Of `user:password`, several with commas between them, as a webui's --api-auth. EstimateError where it is not."""
    pairs = [pair.strip().partition(":") for pair in (given or "").split(",") if pair.strip()]
    if not all(user.strip() and colon and password.strip() for user, colon, password in pairs):
        raise EstimateError("--api-auth must be user:password, or several with commas between them.")
    return [(user, password) for user, _, password in pairs]


def _guard(accounts: Sequence[tuple[str, str]]) -> Callable:
    def check(given: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:  # noqa: B008 (as FastAPI wants it)
        sent = f"{given.username}:{given.password}".encode()
        if not any(compare_digest(sent, f"{user}:{password}".encode()) for user, password in accounts):
            raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})

    return check


async def body(request: Request) -> bytes:
    """What is sent. Only as JSON: that is what a page of another site can't send without being asked by a browser."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send the request as JSON, with the header Content-Type: application/json.")
    read, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BYTES:
            read += piece
        elif size > MOST_THROWN_AWAY:
            break
    if size > MOST_BYTES:
        raise HTTPException(413, f"The request is longer than {MOST_KB} kB.")
    return bytes(read)


def answered(handler: Callable[..., dict[str, Any]]) -> Callable[..., Response]:
    """What a handler gives, or why not, as JSON."""

    @functools.wraps(handler)
    def answer(*given: Any, **named: Any) -> Response:
        try:
            return _json(200, handler(*given, **named))
        except Refused as error:
            return _said(error.status, error, **error.more)
        except TooMany as error:
            return _said(429, error)
        except EstimateError as error:
            return _said(422, error, field=getattr(error, "field", "") or None)
        except Exception as error:  # the last place where it can become a sentence
            log.exception("The API failed")
            return _said(500, f"Unexpected {type(error).__name__}; the log says more.")

    return answer


def _said(status: int, error: Any, **more: Any) -> Response:
    return _json(status, {"detail": asked.in_the_api(str(error))[:LONGEST_SENTENCE], **more})


def _json(status: int, answer: dict[str, Any]) -> Response:
    return Response(json.dumps(_finite(answer)), status, media_type="application/json")


def _finite(value: Any) -> Any:
    """With null for numbers that JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


class Api:
    """What each route does."""

    def __init__(self, program: Program) -> None:
        self.program, self.tasks = program, Tasks(program.turn)

    @property
    def folder(self) -> Path:
        return Path(self.program.embeddings_folder())

    @answered
    def estimate(self, raw: bytes = Depends(body)) -> dict[str, Any]:
        """Begins an estimate, or puts it behind those before it. Answers at once with the id of the task."""
        request = asked.estimate_request(asked.read_json(raw), self.folder, self.program.start_values())
        return self._told(self.tasks.add(self._estimated(request)))

    @answered
    def measure(self, raw: bytes = Depends(body)) -> dict[str, Any]:
        """Begins to measure an embedding of the folder against a prompt. A task, as an estimate is."""
        path, request = asked.measure_request(asked.read_json(raw), self.folder)
        return self._told(self.tasks.add(self._measured(path, request)))

    @answered
    def parse(self, raw: bytes = Depends(body)) -> dict[str, Any]:
        """How a prompt is read, at once: the parts of AND, the text from step to step, tokens with their weights."""
        prompt, steps, negative = asked.parse_request(asked.read_json(raw))
        with self.program.reader() as reader:
            _, tags = ("", []) if negative else reader.tags(prompt)
            parts = reader.read(prompt, steps, negative=negative)
            texts = dict.fromkeys(text for part in parts for _, text in part.texts)
            chunks = {text: reader.tokens(text) for text in texts}
            notes = reader.notes(prompt)
        rows = [{"weight": p.weight, "texts": [{"until": end, "text": text} for end, text in p.texts]} for p in parts]
        read = [{"text": text, "chunks": [list(map(_token, c)) for c in found]} for text, found in chunks.items()]
        return {"prompt": prompt, "steps": steps, "parts": rows, "texts": read, "tags": tags, "notes": notes}

    @answered
    def progress(self, task: str) -> dict[str, Any]:
        """How far a task is."""
        return self._told(self._found(task))

    @answered
    def interrupt(self, task: str, how: str = WAYS[0]) -> dict[str, Any]:
        """Stops a task: how=save keeps the best so far, how=discard nothing."""
        if how not in WAYS:
            raise RequestError(f"how is {how!r}: choose one of {', '.join(WAYS)}.", "how")
        found = self._found(task)
        if not self.tasks.interrupt(found, save=how == WAYS[0]):
            raise Refused(409, f"The task is over: {found.words}", state=found.state.value)
        return self._told(found)

    @answered
    def result(self, task: str, pictures: bool = False) -> dict[str, Any]:
        """What came of a task. pictures: with its pictures, as PNG in base64."""
        found = self._found(task)
        if not found.over:
            raise Refused(409, "The task is not over yet: ask for its progress.", state=found.state.value)
        if found.result is None:
            raise Refused(422, found.words, state=found.state.value)
        if not pictures:
            return found.result.record
        shown = [{"title": title, "png": base64.b64encode(png).decode()} for title, png in found.result.pictures]
        return {**found.result.record, "pictures": shown}

    def _found(self, identifier: str) -> Task:
        found = self.tasks.find(identifier)
        if found is None:
            raise Refused(404, "There is no task of this id. Those that are long over are forgotten.")
        return found

    def _told(self, task: Task) -> dict[str, Any]:
        return {
            "id": task.id, "state": task.state.value, "fraction": task.fraction, "words": asked.in_the_api(task.words),
            "notes": list(map(asked.in_the_api, task.notes)), "seconds_left": task.seconds_left,
            "before": self.tasks.before(task),
        }  # fmt: skip

    # ---- what tasks do ----

    def _seen(self, view: View, cancel: Cancel) -> View:
        """As the tab does: the program shows it, and its own interrupt counts."""
        if self.program.interrupted() and cancel.wanted is None:
            cancel.save()
        self.program.show(view)
        return view

    def _estimated(self, request: EstimateRequest) -> Work:
        def work(cancel: Cancel) -> Iterator[View | Result]:
            for view in views(request, self.program.host(), cancel):
                yield self._seen(view, cancel)
            outcome = view.outcome
            made = [taken_in(self.program, request, *file) for file in cards(outcome, request)]
            notes = dict.fromkeys(note for each in made for note in each)
            record = {**outcome.record, "written": outcome.written}
            yield Result(record, _pngs(gallery(outcome.fidelity, outcome.title)), (*view.notes, *notes))

        return work

    def _measured(self, path: Path, request: EstimateRequest) -> Work:
        def work(cancel: Cancel) -> Iterator[View | Result]:
            embedding = reading.load(path)
            for view, fidelity in measuring(embedding, request, self.program.host()):
                if cancel.wanted is not None:
                    raise Interrupted("Interrupted. There are no figures.")
                if fidelity is None:
                    yield self._seen(view, cancel)
            record = measurement(path, embedding, request, fidelity)
            yield Result(record, _pngs(gallery(fidelity, embedding.name)), view.notes)

        return work


def _token(token: Token) -> dict[str, Any]:
    return {"text": token.text, "weight": token.weight, "vectors": token.vectors}


def _pngs(pictures: Sequence[tuple[Any, str]]) -> list[tuple[str, bytes]]:
    made = []
    for picture, title in pictures:
        file = io.BytesIO()
        picture.save(file, format="PNG")
        made.append((title, file.getvalue()))
    return made
