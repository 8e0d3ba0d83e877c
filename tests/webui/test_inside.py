"""The checks inside the webui's process: over the stand-in everywhere, and in the real webui where there is one."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib_estimate import job
from lib_estimate.files import reading
from lib_estimate.request import EstimateRequest, Use
from tests.small_models import small_model
from tests.webui import standin
from tests.webui.conftest import ROOT
from tests.webui.real_host import SHAPES_SD, RealHost

PROJECT = Path(__file__).parents[2]
CHECKS = PROJECT / "tests" / "webui" / "checks.py"
USERS = (*sorted((PROJECT / "lib_estimate" / "hosts").glob("webui*.py")), CHECKS)
BASES = {
    "LatentDiffusion": "repositories/stable-diffusion-stability-ai/ldm/models/diffusion/ddpm.py",
    "DiffusionEngine": "repositories/generative-models/sgm/models/diffusion.py",
}
ALSO = {"WebuiSdModel": "DiffusionEngine"}  # what an SDXL checkpoint is made of
NAMES = [
    function.name.removeprefix("check_")
    for function in ast.parse(CHECKS.read_text(encoding="utf-8")).body
    if isinstance(function, ast.FunctionDef) and function.name.startswith("check_")
]


# ---- the checks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["shapes_sd", "small SDXL"])
def over_the_stand_in(request, tmp_path_factory) -> dict[str, Any]:
    """What every check says over the stand-in, in a process of its own so that nothing of it stays in this one."""
    model = SHAPES_SD
    if request.param != "shapes_sd":
        model = tmp_path_factory.mktemp("xl")
        small_model("sdxl").pipeline().save_pretrained(model)
    done = subprocess.run(
        [sys.executable, "-m", "tests.webui.standin", model], cwd=PROJECT, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", NAMES)
def test_over_the_stand_in(over_the_stand_in, name: str) -> None:
    assert "error" not in over_the_stand_in[name], over_the_stand_in[name]["error"]


if ROOT:  # not skipped one by one: conftest.py says it in one line

    @pytest.mark.parametrize("name", NAMES)
    def test_in_the_real_webui(each_real_host: RealHost, name: str) -> None:
        print(json.dumps(each_real_host.run(name)))

    def test_an_estimate_of_the_real_webui_measures_the_same_here(real_host: RealHost, host, tmp_path) -> None:
        """The same file in both hosts: two runs of L-BFGS part ways in their last digits, two measurements do not."""
        there = real_host.run("estimate")
        request = EstimateRequest(
            **there["settings"], name="here", out=str(tmp_path), use=Use.WHOLE, sentence=("a photo of {}",), images=0
        )
        *_, here = job.measured(reading.load(Path(there["file"])), request, host)
        *_, own = job.estimate(request, host)
        print(f"recovered: {there['recovered']:.4f} of the webui's file there, {here.recovered:.4f} of it here, "
              f"{own.fidelity.recovered:.4f} of a file made here")  # fmt: skip
        assert here.recovered == pytest.approx(there["recovered"], abs=0.02)
        assert here.error == pytest.approx(there["error"], rel=0.05)
        assert here.unweighted_error == pytest.approx(there["unweighted_error"], rel=0.05)

    # ---- names and signatures, read without importing anything ------------------------------------------------------

    def test_the_stand_in_has_the_real_names_and_signatures() -> None:
        for file, members in standin.STANDS_FOR.items():
            real = parsed(Path(ROOT) / file)
            for name in standin.VALUES.get(file, {}):
                assert name in real.names, f"{file} has no {name}"
            for member in members:
                where = f"{file}: {member.__name__}"
                assert member.__name__ in real.names, where
                if inspect.isfunction(member):
                    assert_same_parameters(member, real.functions[member.__name__], where)
                elif member.__name__ in real.classes:
                    assert_same_class(member, real, where)
        options = (Path(ROOT) / "modules" / "shared_options.py").read_text(encoding="utf-8")
        for option in standin.OPTIONS:
            assert f'"{option}": OptionInfo(' in options, option
        assert '"--embeddings-dir"' in (Path(ROOT) / "modules" / "cmd_args.py").read_text(encoding="utf-8")

    def test_every_name_we_touch_is_in_the_real_webui() -> None:
        for user in USERS:
            for module, name in touched(user):
                file = Path(ROOT) / "modules" / f"{module}.py"
                assert file.exists(), f"{user.name}: modules.{module}"
                assert name is None or name in parsed(file).names, f"{user.name}: modules.{module}.{name}"


class Parsed:
    """The names at the top of a file, its functions with their parameters, its classes."""

    def __init__(self, tree: ast.Module) -> None:
        self.functions = {f.name: f for f in tree.body if isinstance(f, ast.FunctionDef)}
        self.classes = {c.name: c for c in tree.body if isinstance(c, ast.ClassDef)}
        self.names = {*self.functions, *self.classes, *assigned(tree.body)}
        self.names |= {a.asname or a.name for s in tree.body if isinstance(s, ast.ImportFrom) for a in s.names}

    def line(self, name: str) -> list[ast.ClassDef]:
        """A class and those it is made from."""
        found = self.classes.get(name)
        if found is None and name in BASES:
            return parsed(Path(ROOT) / BASES[name]).line(name)
        return [found, *(c for b in found.bases for c in self.line(getattr(b, "id", "")))] if found else []


def parsed(file: Path) -> Parsed:
    return Parsed(ast.parse(file.read_text(encoding="utf-8")))


def assigned(body: list[ast.stmt]) -> set[str]:
    """Names that statements assign to, at their own level."""
    targets = [t for s in body if isinstance(s, ast.Assign) for t in s.targets]
    targets += [s.target for s in body if isinstance(s, ast.AnnAssign)]
    return {name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name)}


def attributes(line: list[ast.ClassDef]) -> set[str]:
    """All that objects of a class can be asked for, also where it is set in passing (`self.x = 1`)."""
    found = set()
    for one in line:
        found |= assigned(one.body) | {f.name for f in one.body if isinstance(f, ast.FunctionDef)}
        for node in ast.walk(one):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                found.add(node.attr)
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
                found.add(node.args[0].value)
    return found


def assert_same_class(ours: type, real: Parsed, where: str) -> None:
    """Every public name of our class is in the real one; methods take the real parameters."""
    mine = parsed(Path(standin.__file__)).classes[ours.__name__]
    line = real.line(ours.__name__) + real.line(ALSO.get(ours.__name__, ""))
    for name in attributes([mine]):
        if not name.startswith("_"):
            assert name in attributes(line), f"{where}.{name}"
    for name, method in vars(ours).items():
        theirs = [f for c in line for f in c.body if isinstance(f, ast.FunctionDef) and f.name == name]
        if inspect.isfunction(method) and theirs:
            assert_same_parameters(method, theirs[0], f"{where}.{name}")


def assert_same_parameters(ours: Any, theirs: ast.FunctionDef, where: str) -> None:
    """Ours are the first of the real ones, and leave out none that has to be given."""
    given = inspect.signature(ours).parameters.values()
    if any(p.annotation is not p.empty for p in given):
        return
    arguments = theirs.args
    positional = [a.arg for a in arguments.args]
    needed = positional[: len(positional) - len(arguments.defaults)]
    mine = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert mine == positional[: len(mine)], where
    assert len(mine) >= len(needed), where
    assert {p.name for p in given if p.kind is p.KEYWORD_ONLY} <= {a.arg for a in arguments.kwonlyargs}, where


def touched(file: Path) -> set[tuple[str, str | None]]:
    """(module, name) of all that a file takes from the webui: `from modules import a` and `a.name`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    modules = {a.name for node in imports if node.module == "modules" for a in node.names}
    found: set[tuple[str, str | None]] = {(module, None) for module in modules}
    for node in imports:
        if node.module.startswith("modules."):
            found |= {(node.module.removeprefix("modules."), a.name) for a in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add((node.value.id, node.attr))
    return found
