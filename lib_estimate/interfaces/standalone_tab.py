"""The tab without a webui: on the host of the command line, in a browser on this computer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from lib_estimate.hosts.base import Host
from lib_estimate.hosts.several import each_of, together
from lib_estimate.hosts.standalone import StandaloneHost, StandaloneSession
from lib_estimate.interfaces import api
from lib_estimate.interfaces.tab import build
from lib_estimate.interfaces.view import View
from lib_estimate.request import EstimateRequest, ModelOptions

STYLE = Path(__file__).parents[2] / "style.css"


class StandaloneShell:
    """See `interfaces.api.Program`."""

    live = True
    # One that another thread may release than took it: a run of the tab wanders.
    model_lock = threading.Lock()
    _accounts: api.Accounts = None

    def __init__(self, options: Sequence[ModelOptions], folder: str, accounts: api.Accounts = None) -> None:
        """options: of each checkpoint that embeddings are made for. accounts: see `api.Program`."""
        self.folder, self._accounts = folder, accounts
        self.model = together([StandaloneHost(each, Path(folder)) for each in options])

    def host(self) -> Host:
        return self.model

    def checkpoint(self) -> str:
        return ", ".join(self.checkpoints())

    def checkpoints(self) -> Sequence[str]:
        return [host.parts.name for host in each_of(self.model)]

    def on(self, checkpoints: Sequence[str]) -> Host:
        return together([host for host in each_of(self.model) if host.parts.name in checkpoints])

    @contextmanager
    def turn(self, task: str) -> Iterator[None]:
        with self.model_lock:
            yield

    def accounts(self) -> api.Accounts:
        return self._accounts

    def embeddings_folder(self) -> str:
        return self.folder

    def start_values(self) -> dict[str, Any]:
        return {}

    def wrap(self, run: Callable, failed: Sequence[Any]) -> Callable:
        return run

    def about(self) -> Mapping[str, str]:
        with self.reader() as session:
            kind = f"{dict(session.info.widths)}, {session.parts.prediction}, {session.info.dtype}"
        return {"host": "none, embedding-estimate ui", "checkpoint": kind}

    def show(self, view: View) -> None:
        """The tab itself shows it."""

    def interrupted(self) -> bool:
        return False

    def styles(self) -> Sequence[tuple[str, str, str]]:
        return ()

    def saved(self, request: EstimateRequest, path: Path, picture: Any, description: str) -> None:
        """The folder is read anew at the next run."""

    @contextmanager
    def reader(self) -> Iterator[StandaloneSession]:
        # Not `model.session()`: one that ends inside a run would let the weights learn again.
        session = StandaloneSession(each_of(self.model)[0])
        try:
            yield session
        finally:
            session.close()

    def count_tokens(self, text: str, steps: int, negative: bool) -> str:
        with self.reader() as session:
            pieces = {text for part in session.read(text, steps, negative=negative) for _, text in part.texts}
            most = max((session.tokens(piece) for piece in pieces), key=len)
            used = [sum(max(token.vectors, 1) for token in chunk) for chunk in most]
            length = session.info.chunk_length
        return f"{length * (len(used) - 1) + used[-1]}/{length * len(used)}"

    def send_buttons(self) -> Sequence[str]:
        return ()

    def restore(self, task: str) -> Any:
        raise NotImplementedError("a run of this tab lives and ends with its page")


def launch(
    options: Sequence[ModelOptions],
    folder: str,
    port: int,
    *,
    browser: bool,
    accounts: api.Accounts = None,
    wait: bool = True,
) -> gr.Blocks:
    """Opens the tab on 127.0.0.1, with the API for `accounts`; returns when it is closed, without `wait` at once."""
    style = STYLE.read_text(encoding="utf-8") if STYLE.exists() else ""
    shell = StandaloneShell(options, folder, accounts)
    blocks = build(shell)
    blocks.title = "Embedding Estimate"
    blocks.queue()
    app, _, _ = blocks.launch(
        server_name="127.0.0.1", server_port=port, inbrowser=browser, share=False, prevent_thread_lock=True, css=style,
    )  # fmt: skip
    api.add_routes(app, shell)
    if wait:
        blocks.block_thread()
    return blocks
