"""The checks inside the webui's process: over the stand-in everywhere, and in the real webui where there is one."""

from __future__ import annotations

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lib_estimate import job
from lib_estimate.files import reading
from lib_estimate.hosts.family import FAMILIES
from lib_estimate.measuring import measured
from lib_estimate.request import EstimateRequest, Part, Use
from tests.small_models import small_model
from tests.webui import standin, standin_forge
from tests.webui.conftest import ROOT
from tests.webui.real_host import SHAPES_SD, RealHost

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
HOSTS = PROJECT / "lib_estimate" / "hosts"
CHECKS = tuple(HERE / f"checks{what}.py" for what in ("", "_checkpoints", "_lora", "_traps", "_api"))
SHARED = (*sorted(HOSTS.glob("webui_*.py")), HOSTS / "family.py", HERE / "runs.py", *CHECKS)
STANDINS = {"webui": standin, "forge": standin_forge}  # by the file of hosts/ that knows the family
PACKAGES = ("modules", "backend", "modules_forge", "ldm_patched")  # a webui's own, as far as it has them
BASES = {
    "LatentDiffusion": "repositories/stable-diffusion-stability-ai/ldm/models/diffusion/ddpm.py",
    "DiffusionEngine": "repositories/generative-models/sgm/models/diffusion.py",
    "ForgeDiffusionEngine": "backend/diffusion_engine/base.py",
}
ALSO = {"WebuiSdModel": "DiffusionEngine"}  # what an SDXL checkpoint is made of
UNUSED = {("forge", "modules.sd_hijack_open_clip")}  # its text encoders have each a tokenizer of its own


def checks_of(file: Path) -> list[str]:
    functions = [one for one in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(one, ast.FunctionDef)]
    return [one.name.removeprefix("check_") for one in functions if one.name.startswith("check_")]


NAMES = [name for file in CHECKS for name in checks_of(file)]
NAMES.remove("short_run")  # has nothing to say by itself: a test compares what it makes
# Where SDXL goes another way than SD 1 does; CI has no time for the others twice. A real webui runs all of them on
# every checkpoint it is given.
OF_SDXL = (
    "targets_are_what_the_sampler_gets", "the_unet_is_the_samplers", "every_part_learns", "a_saved_name_works_at_once",
    "the_host_is_as_before_after_success", "options_of_emphasis_and_clip_skip_are_the_hosts",
    "recomputing_gives_the_same_gradient", "a_gradient_after_a_decoding",
    "a_new_file_needs_the_right_list_and_no_old_conditioning", "the_host_is_as_before_a_lora_was_taken_over",
)  # fmt: skip
# What takes long and is the same code in the family of Forge, over its stand-in.
ALIKE_IN_FORGE = (
    "a_word_takes_over_a_lora", "a_lora_of_the_last_picture_is_learnt_with", "estimate", "an_estimate_over_http",
    "interrupts_over_http_and_the_webuis_own", "what_the_api_refuses", "the_host_is_as_before_after_interrupts",
)  # fmt: skip
SHORT_OF_SDXL = OF_SDXL[:4]
RUNS = {(family, model): NAMES if model == "sd1" else OF_SDXL for family in STANDINS for model in ("sd1", "sdxl")}
RUNS["forge", "sd1"] = [name for name in NAMES if name not in ALIKE_IN_FORGE]
RUNS["forge", "sdxl"] = list(SHORT_OF_SDXL)
# What Forge's stand-in must have for the checks of the cures to see the harm without them.
TRAPS = {
    "weights_of_inference_mode_need_views": ["transformer", "cross-attention", "unet"],
    "a_run_loads_the_chosen_checkpoint": ["before first use", "after a failed load, taken for loaded"],
    "a_new_file_needs_the_right_list_and_no_old_conditioning": ["conditioning", "list"],
}


# ---- the checks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def said_over(tmp_path_factory) -> Callable[[str, str], dict[str, Any]]:
    """What the checks say over a stand-in, in a process of its own so that nothing of it stays in this one."""

    @cache
    def said(family: str, model: str) -> dict[str, Any]:
        path = SHAPES_SD
        if model == "sdxl":
            path = tmp_path_factory.mktemp("xl")
            small_model("sdxl").pipeline().save_pretrained(path)
        done = subprocess.run(
            [sys.executable, "-m", STANDINS[family].__name__, path, *RUNS[family, model]], cwd=PROJECT,
            capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return {row["name"]: row for row in map(json.loads, done.stdout.splitlines())}

    return said


@pytest.mark.parametrize(("family", "model", "name"), [(*run, name) for run, names in RUNS.items() for name in names])
def test_over_the_stand_in(said_over, family: str, model: str, name: str) -> None:
    said = said_over(family, model)[name]
    assert "error" not in said, said["error"]
    if family == "forge" and "trap" in said["figures"]:
        assert said["figures"]["trap"] == TRAPS.get(name, True)


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
        *_, here = measured(reading.load(Path(there["file"])), request, host)
        *_, own = job.estimate(request, host)
        print(f"recovered: {there['recovered']:.4f} of the webui's file there, {here.recovered:.4f} of it here, "
              f"{own.fidelity.recovered:.4f} of a file made here")  # fmt: skip
        assert here.recovered == pytest.approx(there["recovered"], abs=0.02)
        assert here.error == pytest.approx(there["error"], rel=0.05)
        assert here.unweighted_error == pytest.approx(there["unweighted_error"], rel=0.05)

    def test_the_same_request_gives_the_same_vectors_there_and_here(real_host: RealHost, host, tmp_path) -> None:
        """While a run is short: later, two of L-BFGS part ways in their last digits."""
        there = real_host.run("short_run")
        for part, file in there["files"].items():
            request = EstimateRequest(
                **there["settings"], part=Part(part), name=f"here-{part}", out=str(tmp_path), use=Use.WHOLE
            )
            *_, own = job.estimate(request, host)
            pairs = zip(reading.load(Path(file)).vectors.values(), own.embedding.vectors.values(), strict=True)
            apart = max((a - b).abs().max().item() for a, b in pairs)
            print(f"{part}: the vectors differ by {apart:.1e} at the most")
            assert apart < 1e-3, part

    # ---- names and signatures, read without importing anything ------------------------------------------------------

    def test_the_stand_in_has_the_real_names_and_signatures() -> None:
        stands = STANDINS[family_of(Path(ROOT))]
        for file, members in stands.STANDS_FOR.items():
            real = parsed(Path(ROOT) / file)
            for name in stands.VALUES[file]:
                assert name in real.names, f"{file} has no {name}"
            for member in members:
                where = f"{file}: {member.__name__}"
                assert member.__name__ in real.names, where
                if inspect.isfunction(member):
                    assert_same_parameters(member, real.functions[member.__name__], where)
                elif member.__name__ in real.classes:
                    assert_same_class(member, real, where)
        options = (Path(ROOT) / "modules" / "shared_options.py").read_text(encoding="utf-8")
        for option in stands.OPTIONS:
            assert f'"{option}": OptionInfo(' in options, option
        assert '"--embeddings-dir"' in (Path(ROOT) / "modules" / "cmd_args.py").read_text(encoding="utf-8")

    def test_every_name_we_touch_is_in_the_real_webui() -> None:
        for user in (*SHARED, HOSTS / f"{family_of(Path(ROOT))}.py"):
            for module, name in touched(user):
                file = Path(ROOT) / f"{module.replace('.', '/')}.py"
                here = (Path(ROOT) / module.partition(".")[0]).is_dir()
                if not here or (family_of(Path(ROOT)), module) in UNUSED:
                    continue  # of another webui
                assert file.exists(), f"{user.name}: {module}"
                assert name is None or name in parsed(file).names, f"{user.name}: {module}.{name}"


def family_of(root: Path) -> str:
    """As `hosts.family` tells it, by the files of a checkout."""
    return next(name for mark, name in FAMILIES.items() if (root / f"{mark.replace('.', '/')}.py").exists())


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
    own = [c for c in ours.__mro__ if c.__module__.startswith("tests.")]
    mine = [parsed(Path(inspect.getfile(c))).classes[c.__name__] for c in own]
    line = real.line(ours.__name__) + real.line(ALSO.get(ours.__name__, ""))
    for name in attributes(mine):
        if not name.startswith("_"):
            assert name in attributes(line), f"{where}.{name}"
    for name, method in {name: method for c in reversed(own) for name, method in vars(c).items()}.items():
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
    """(module, name) of all that a file takes from the webui: `from modules import a` and then `a.name`, `from
    modules.a import name`. A module that such a name may be is one if it is used as one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found: set[tuple[str, str | None]] = set()
    modules: dict[str, str] = {}
    for node in imports:
        if node.module.partition(".")[0] not in PACKAGES:
            continue
        for name in (a.name for a in node.names):
            whole = f"{node.module}.{name}"
            if (Path(ROOT) / f"{whole.replace('.', '/')}.py").exists() or "." not in node.module:
                modules[name] = whole
                found.add((whole, None))
            else:
                found.add((node.module, name))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            found.add((modules[node.value.id], node.attr))
    return found
