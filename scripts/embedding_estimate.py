"""What the webui executes: puts the tab, the settings and the HTTP API of lib_estimate into it."""

from typing import Any

from modules import script_callbacks

from lib_estimate.hosts import webui_shell
from lib_estimate.interfaces import api
from lib_estimate.interfaces.tab import build


def tab() -> list:
    return [(build(webui_shell.WebuiShell()), "Embedding Estimate", "embedding_estimate")]


def routes(_demo: Any, app: Any) -> None:
    api.add_routes(app, webui_shell.WebuiShell())


script_callbacks.on_ui_settings(webui_shell.add_settings)
script_callbacks.on_ui_tabs(tab)
script_callbacks.on_app_started(routes)
