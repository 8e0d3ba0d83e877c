"""What the webui executes: puts the tab and the settings of lib_estimate into it."""

from modules import script_callbacks

from lib_estimate.hosts import webui_shell
from lib_estimate.interfaces.tab import build


def tab() -> list:
    return [(build(webui_shell.WebuiShell()), "Embedding Estimate", "embedding_estimate")]


script_callbacks.on_ui_settings(webui_shell.add_settings)
script_callbacks.on_ui_tabs(tab)
