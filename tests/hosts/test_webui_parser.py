"""A webui's own parser, where it gives up."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest

from lib_estimate.errors import PromptSyntaxError


def give_up(*_: object) -> None:
    raise RecursionError("maximum recursion depth exceeded")


@pytest.fixture
def webui_text(monkeypatch):
    """The host's file over a webui whose parser and tokenizer can't follow."""
    modules = ModuleType("modules")
    modules.extra_networks = SimpleNamespace(parse_prompt=lambda prompt: (prompt, {}))
    modules.prompt_parser = SimpleNamespace(
        get_multicond_prompt_list=give_up, get_learned_conditioning_prompt_schedules=give_up
    )
    monkeypatch.setitem(sys.modules, "modules", modules)
    name = "lib_estimate.hosts.webui_text"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


def test_brackets_too_deep_for_a_webui_are_a_sentence(webui_text) -> None:
    engine = SimpleNamespace(encoder=SimpleNamespace(tokenize_line=give_up))
    text, prompt = webui_text.WebuiText({"clip_l": engine}, "cpu"), "[" * 9000
    for read in (
        lambda: text.read(prompt, 20),
        lambda: text.read(prompt, 20, negative=True),
        lambda: text.tokens(prompt),
    ):
        with pytest.raises(PromptSyntaxError, match="can't read the prompt") as caught:
            read()
        assert len(str(caught.value)) < 200
