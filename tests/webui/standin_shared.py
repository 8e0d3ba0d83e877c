"""What the stand-ins of all webuis share: their parsers, options and progress, and how they are put in place.

For where there is no webui: `install` puts names of it into `sys.modules` of this process. They behave like the webui
where the checks look, and nowhere else. What is here is named as in the webui and listed in STANDS_FOR; with WEBUI_ROOT
a test compares names, attributes and parameters with the real ones. Only what has no annotated parameters is compared
by them: the rest is put together in another way here.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.prompt import schedule
from tests.webui.standin_lora import ExtraNetworkParams, activate, deactivate, extra_network_registry, parse_prompt

# ---- prompt_parser ------------------------------------------------------------------------------------------------


class SdConditioning(list):
    """Prompts of a batch."""

    def __init__(self, prompts, is_negative_prompt=False, width=None, height=None, copy_from=None):
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height
        if copy_from is not None:
            self.__dict__.update(copy_from.__dict__)


class ScheduledPromptConditioning(NamedTuple):
    """What a prompt is encoded to, and until which step."""

    end_at_step: int
    cond: torch.Tensor


class MulticondLearnedConditioning:
    """The encoded parts of prompts with AND."""

    def __init__(self, batch: list) -> None:
        self.batch = batch


def get_learned_conditioning_prompt_schedules(prompts, base_steps, hires_steps=None, use_old_scheduling=False):
    try:
        return [[list(row) for row in schedule.prompt_schedule(prompt, base_steps)] for prompt in prompts]
    except PromptSyntaxError as error:
        raise ValueError(str(error)) from error


def get_multicond_prompt_list(prompts):
    flat, indexes = [], []
    for prompt in prompts:
        parts = schedule.split_and(prompt)
        indexes.append([(len(flat) + i, weight) for i, (_, weight) in enumerate(parts)])
        flat += [text for text, _ in parts]
    return indexes, flat, {text: i for i, text in enumerate(flat)}


def get_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    out = []
    for changes in get_learned_conditioning_prompt_schedules(prompts, steps):
        conds = model.get_learned_conditioning(SdConditioning([text for _, text in changes], copy_from=prompts))
        out.append([ScheduledPromptConditioning(end, _row(conds, i)) for i, (end, _) in enumerate(changes)])
    return out


def get_multicond_learned_conditioning(model, prompts, steps, hires_steps=None, use_old_scheduling=False):
    indexes, flat, _ = get_multicond_prompt_list(prompts)
    learned = get_learned_conditioning(model, SdConditioning(flat, copy_from=prompts), steps)
    return MulticondLearnedConditioning([[(learned[i], weight) for i, weight in parts] for parts in indexes])


def _at(schedule, step):
    return next(entry.cond for entry in schedule if step <= entry.end_at_step)


def _row(conds, index):
    return {key: rows[index] for key, rows in conds.items()} if isinstance(conds, dict) else conds[index]


def _stacked(rows):
    if isinstance(rows[0], dict):
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return torch.stack(rows)


def reconstruct_cond_batch(c, current_step):
    return _stacked([_at(schedule, current_step) for schedule in c])


def reconstruct_multicond_batch(c, current_step):
    conds, tensors = [], []
    for parts in c.batch:
        conds.append([(len(tensors) + i, weight) for i, (_, weight) in enumerate(parts)])
        tensors += [_at(schedule, current_step) for schedule, _ in parts]
    return conds, _stacked(tensors)


# ---- processing ---------------------------------------------------------------------------------------------------


class StableDiffusionProcessing:
    """One generation, and what the last ones were encoded to."""

    cached_c = [None, None]  # noqa: RUF012 (shared on purpose, as the webui's)
    cached_uc = [None, None]  # noqa: RUF012

    def __init__(self, **given: Any) -> None:
        self.extra_generation_params: dict[str, Any] = {}
        self.__dict__.update(given)
        self.all_prompts, self.scripts = [], None


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    """One generation from text."""


class Processed:
    """What a generation gives."""

    def __init__(self, images: list, info: str) -> None:
        self.images, self.info = images, info


def txt2img_image_conditioning(sd_model, x, width, height):
    return x.new_zeros(x.shape[0], 5, 1, 1)


@torch.no_grad()
def encode_prompts(p: StableDiffusionProcessing) -> None:
    """Into the caches, which go by the text and the tags in the prompt."""
    for cache, text in ((p.cached_c, parse_prompt(p.prompt)[0]), (p.cached_uc, p.negative_prompt)):
        key = text, schedule.extra_network_tags(p.prompt)[1]
        if cache[0] != key:
            given = SdConditioning([text], cache is p.cached_uc, p.width, p.height)
            cache[:] = [key, get_learned_conditioning(p.sd_model, given, p.steps)]


@torch.no_grad()
def drawn(
    p: StableDiffusionProcessing,
    shape: tuple[int, ...],
    alphas_cumprod: Tensor,
    eps: Callable[[Tensor, Tensor, Any], Tensor],
    decode: Callable[[Tensor], Tensor],
    info: str = "",
) -> Processed:
    """A few steps of DDIM under CFG, with what the prompts were encoded to."""
    x, apart = torch.randn(shape, generator=torch.Generator().manual_seed(p.seed)), 1000 // p.steps
    for step in range(p.steps):
        t = 1 + apart * (p.steps - 1 - step)
        own, other = (
            eps(x, torch.tensor([t]), reconstruct_cond_batch(cache[1], step)) for cache in (p.cached_c, p.cached_uc)
        )
        guided = other + p.cfg_scale * (own - other)
        a, b = (alphas_cumprod[i].float() for i in (t, max(t - apart, 0)))
        x = b.sqrt() * (x - (1 - a).sqrt() * guided) / a.sqrt() + (1 - b).sqrt() * guided
    (picture,) = decode(x)
    array = ((picture / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy().astype(np.uint8)
    return Processed([Image.fromarray(array)], f"{p.prompt}\nSteps: {p.steps}{info}")


# ---- the rest -----------------------------------------------------------------------------------------------------


class OptionInfo:
    """An option of the settings page."""

    def __init__(self, default=None, label="", component=None, component_args=None):
        self.default, self.section = default, None


class Options:
    """Options, with their values in `data` as in the webui."""

    def __init__(self, **values: Any) -> None:
        self.__dict__["data"] = values

    def add_option(self, key, info):
        self.data.setdefault(key, info.default)

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.data[name] = value


class State:
    """How far the running job is."""

    interrupted = stopping_generation = False
    job, textinfo, current_image = "", None, None
    job_count = job_no = sampling_step = sampling_steps = 0

    def begin(self, job="(unknown)"):
        self.job = job

    def end(self):
        self.job = ""

    def assign_current_image(self, image):
        self.current_image = image


def autocast(disable=False):
    return contextlib.nullcontext()


def restore_progress(id_task):
    return None


checkpoint_aliases: dict[str, CheckpointInfo] = {}


class CheckpointInfo:
    """A checkpoint that can be loaded."""

    def __init__(self, filename):
        self.filename, self.model_name, self.title = str(filename), Path(filename).stem, Path(filename).name
        self.shorthash = None

    def register(self):
        checkpoint_aliases[self.title] = self


def checkpoint_tiles(use_short=False):
    return list(checkpoint_aliases)


def list_models():
    """Reads anew what there is: the one that the webui was started with."""
    checkpoint_aliases.clear()
    started_with[0].register()


started_with: list[CheckpointInfo] = []


def git_tag():
    return "v0-stand-in"


def add_task_to_queue(id_job):
    """What the page is told of those that wait is not looked at."""


def start_task(id_task):
    sys.modules["modules.progress"].current_task = id_task


def finish_task(id_task):
    sys.modules["modules.progress"].current_task = None


# ---- in place -----------------------------------------------------------------------------------------------------

Standing = dict[str, tuple[Any, ...]]  # file of the webui -> classes and functions in it
Values = dict[str, dict[str, Any]]  # file of the webui -> names in it

shared = ModuleType("modules.shared")
VALUES: Values = {
    "modules/call_queue.py": {"queue_lock": threading.Lock()},
    "modules/extra_networks.py": {"extra_network_registry": extra_network_registry},
    "modules/devices.py": {"device": torch.device("cpu"), "cpu": torch.device("cpu")},
    "modules/paths_internal.py": {"script_path": "/somewhere/a-stand-in"},
    "modules/sd_models.py": {"checkpoint_aliases": checkpoint_aliases},
    "modules/progress.py": {"current_task": None},
}
STANDS_FOR: Standing = {
    "modules/devices.py": (autocast,),
    "modules/extra_networks.py": (ExtraNetworkParams, parse_prompt, activate, deactivate),
    "modules/launch_utils.py": (git_tag,),
    "modules/options.py": (OptionInfo, Options),
    "modules/paths_internal.py": (),
    "modules/processing.py": (
        StableDiffusionProcessing, StableDiffusionProcessingTxt2Img, Processed, txt2img_image_conditioning,
    ),
    "modules/progress.py": (restore_progress, add_task_to_queue, start_task, finish_task),
    "modules/prompt_parser.py": (
        SdConditioning, ScheduledPromptConditioning, MulticondLearnedConditioning, get_multicond_prompt_list,
        get_learned_conditioning_prompt_schedules, get_learned_conditioning, get_multicond_learned_conditioning,
        reconstruct_cond_batch, reconstruct_multicond_batch,
    ),
    "modules/sd_models.py": (CheckpointInfo, checkpoint_tiles, list_models),
    "modules/shared_state.py": (State,),
}  # fmt: skip


def with_shared(standing: Standing, values: Values) -> tuple[Standing, Values]:
    """A webui's own names, and those that all share."""
    every = {file: (*STANDS_FOR.get(file, ()), *standing.get(file, ())) for file in {**STANDS_FOR, **standing}}
    return every, {file: {**VALUES.get(file, {}), **values.get(file, {})} for file in every}


def install(model: Path, standing: Standing, values: Values, options: dict[str, Any]) -> CheckpointInfo:
    """Makes `import modules` and what is below it work in this process, and likewise other packages of the webui."""
    _module("modules").shared = sys.modules["modules.shared"] = shared
    for file, members in standing.items():
        made = _module(file.removesuffix(".py").replace("/", "."))
        made.__dict__.update({member.__name__: member for member in members}, **values[file])
    shared.opts, shared.state = Options(**options), State()
    shared.cmd_opts = SimpleNamespace(embeddings_dir=tempfile.mkdtemp(), api=True, api_auth=None)
    shared.prompt_styles = SimpleNamespace(styles={})
    started_with[:] = [CheckpointInfo(model)]
    list_models()
    return started_with[0]


def _module(name: str) -> ModuleType:
    """The module of this name, made where there is none, and in the one that it is part of."""
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        above, _, own = name.rpartition(".")
        if above:
            setattr(_module(above), own, sys.modules[name])
    return sys.modules[name]


def main(install: Callable[[Path], None]) -> None:
    """Runs every check, or those named, on the model of the first argument; one line of JSON each."""
    torch.set_num_threads(1)
    install(Path(sys.argv[1]))
    from lib_estimate.hosts import webui_shell
    from tests.webui import checks

    webui_shell.add_settings()
    for name in sys.argv[2:] or checks.CHECKS:
        begun = time.process_time()
        try:
            result = {"name": name, "figures": checks.CHECKS[name]()}
        except Exception:  # noqa: BLE001 (whatever it was, the test shows it)
            result = {"name": name, "error": traceback.format_exc()}
        print(json.dumps({**result, "seconds": round(time.process_time() - begun, 1)}), flush=True)
