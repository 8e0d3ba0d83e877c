"""The layout's one rule: a file imports only files above it, and only the hosts know their libraries."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lib_estimate"
# Folders, and files beside them, in the order in which a prompt passes through; inside of a folder likewise.
ORDER = (
    "errors", "choices", "request", "progress",
    "prompt", "prompt.attention", "prompt.schedule", "prompt.chunks", "prompt.cleaning",
    "prompt.vocabulary",
    "files", "files.names", "files.places", "files.claim", "files.destination", "files.embedding", "files.containers",
    "files.reading", "files.writing", "files.rescue", "files.lists",
    "hosts", "hosts.base", "hosts.denoising", "hosts.precision", "hosts.placement", "hosts.layouts",
    "hosts.text_encoder", "hosts.several", "hosts.checkpoint", "hosts.standalone_text", "hosts.standalone",
    "hosts.lending", "hosts.webui_text", "hosts.webui_networks", "hosts.webui", "hosts.forge",
    "hosts.family", "hosts.webui_session", "hosts.webui_checkpoints", "hosts.webui_shell",
    "target", "target.sentences", "target.besides", "target.texts", "target.limits", "target.target",
    "target.together", "target.bank", "target.error", "target.queries", "target.recording", "target.extra_networks",
    "report", "report.fidelity", "report.in_words", "report.checkpoints", "report.court_of_words",
    "report.against_start", "report.inside", "report.plots",
    "learn", "learn.continued", "learn.initial", "learn.registry", "learn.plan", "learn.objectives",
    "learn.objectives.base", "learn.objectives.hidden_state", "learn.objectives.cross_attention",
    "learn.objectives.sketch", "learn.objectives.denoising", "learn.fit",
    "learn.resume", "learn.learning", "learn.starts", "learn.count", "learn.needs",
    "costs", "job", "measuring", "words", "batch",
    "interfaces", "interfaces.time_left", "interfaces.view", "interfaces.fields", "interfaces.markup",
    "interfaces.effort_tab", "interfaces.shell",
    "interfaces.bug_report", "interfaces.pictures", "interfaces.tasks", "interfaces.asked", "interfaces.api",
    "interfaces.inside_tab", "interfaces.stopped_tab", "interfaces.tab_batch",
    "interfaces.tab", "interfaces.standalone_tab", "interfaces.show", "interfaces.many",
    "interfaces.cli",
    "__main__",
)  # fmt: skip
FOLDERS = ("prompt", "files", "hosts", "target", "report", "learn", "interfaces")
WITHOUT_TORCH = (
    "errors",
    "choices",
    "request",
    "progress",
    "prompt.attention",
    "prompt.schedule",
    "prompt.chunks",
    "prompt.cleaning",
    "prompt.vocabulary",
    "files.names",
    "files.destination",
    "files.containers",
    "files.lists",
)
ONLY_IN = {
    "modules": (
        "hosts.webui_text",
        "hosts.webui_networks",
        "hosts.webui",
        "hosts.forge",
        "hosts.family",
        "hosts.webui_session",
        "hosts.webui_checkpoints",
        "hosts.webui_shell",
    ),
    "backend": ("hosts.forge",),
    "ldm_patched": ("hosts.webui",),
    "ftfy": ("prompt.cleaning",),
    "tokenizers": ("prompt.vocabulary",),
    "diffusers": ("hosts.checkpoint", "hosts.standalone"),
    "gradio": (
        "hosts.webui_shell",
        "interfaces.fields",
        "interfaces.effort_tab",
        "interfaces.tab_batch",
        "interfaces.inside_tab",
        "interfaces.stopped_tab",
        "interfaces.tab",
        "interfaces.standalone_tab",
    ),
    "matplotlib": ("report.plots",),
}
LONGEST = 460  # lines: a file beyond that does more than one job


def files() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    found.pop("__init__", None)
    return found


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    known = set(files())
    found = {name.removeprefix("lib_estimate.") for name in imports(path) if name.startswith("lib_estimate.")}
    return {
        name for name in found if name in known and not any(other.startswith(name + ".") for other in found & known)
    }


def test_every_file_has_a_place() -> None:
    assert set(files()) == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name: str) -> None:
    above = set(ORDER[: ORDER.index(name)])
    assert own_imports(files()[name]) <= above


@pytest.mark.parametrize(
    "name", [name for name in ORDER if name.split(".")[0] in FOLDERS and files()[name].stem == "__init__"]
)
def test_a_folder_says_what_it_is_for_and_hands_on_nothing(name: str) -> None:
    body = ast.parse(files()[name].read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert ast.get_docstring(ast.Module(body, []))


@pytest.mark.parametrize("name", ORDER)
def test_no_file_does_several_jobs(name: str) -> None:
    assert len(files()[name].read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_the_tests_stand_in_the_same_folders() -> None:
    tests = Path(__file__).parent
    assert {path.parent.name for path in tests.glob("*/__init__.py")} >= set(FOLDERS)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_some_files_need_no_torch(name: str) -> None:
    assert not {i for i in imports(files()[name]) if i.split(".")[0] == "torch"}


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_file(library: str) -> None:
    users = {name for name, path in files().items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users <= set(ONLY_IN[library])


# Widths of text encoders and U-Nets, their sums, a chunk with and without its ends, CLIP's words, factors of latents.
OF_A_MODEL = {
    320, 640, 768, 1024, 1280, 1536, 1664, 2048, 2816, 75, 77, 49406, 49407, 49408, 0.18215, 0.13025, 0.00085, 0.012,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("report.plots", "interfaces.tab")])  # pixels
def test_what_a_model_can_say_is_not_in_the_code(name: str) -> None:
    numbers = [
        node.value
        for node in ast.walk(ast.parse(files()[name].read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float))
    ]
    assert not OF_A_MODEL & set(numbers)
