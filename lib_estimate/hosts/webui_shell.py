"""What the tab needs of a webui besides its model: folders, settings, progress, cards, restoring a run.

Leans on, alike in AUTOMATIC1111 1.10.1 and the Forge family: `call_queue.wrap_gradio_gpu_call`,
`progress.restore_progress`, `add_task_to_queue`, `start_task` and `finish_task`, `cmd_opts.api`, `api_auth` and, where
there is one, `nowebui`, `shared.state` (`begin`, `end`, `textinfo`, `job_count`, `sampling_step`,
`assign_current_image`, `interrupted`), `shared.prompt_styles`, `ui.update_token_counter`, the caches `cached_c`,
`cached_uc`, `cached_hr_c`, `cached_hr_uc` of the processing classes, `OptionInfo`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from modules import call_queue, devices, paths_internal, processing, progress, shared
from modules.options import OptionInfo

from lib_estimate.errors import ModelError
from lib_estimate.files.places import hidden
from lib_estimate.hosts import webui_checkpoints
from lib_estimate.hosts.base import Host
from lib_estimate.hosts.family import family
from lib_estimate.hosts.webui_session import WebuiHost
from lib_estimate.hosts.webui_text import WebuiText
from lib_estimate.request import EstimateRequest, Part

log = logging.getLogger(__name__)

SECTION = ("embedding_estimate", "Embedding Estimate")
PARTS_OF_PROGRESS = 1000
UNKNOWN = "?"
CACHES = ("cached_c", "cached_uc", "cached_hr_c", "cached_hr_uc")


def add_settings() -> None:
    """The section of the webui's settings page."""
    parts = {"choices": [part.value for part in Part]}
    memory = _bounds("memory")
    for key, option in {
        "part": OptionInfo(EstimateRequest.part.value, "Training part chosen at the start", gr.Radio, parts),
        "subfolder": OptionInfo(EstimateRequest.subfolder, "Folder inside the embeddings folder for new embeddings"),
        "card": OptionInfo(True, "Make a card (preview picture and description) for a new embedding"),
        "memory": OptionInfo(
            EstimateRequest.memory, "GB that recorded queries and the sketch of the U-Net may take", gr.Slider, memory
        ),
    }.items():
        option.section = SECTION
        shared.opts.add_option(f"embedding_estimate_{key}", option)


def _bounds(name: str) -> dict[str, float]:
    about = EstimateRequest.__dataclass_fields__[name].metadata
    return {"minimum": about["low"], "maximum": about["high"], "step": 0.1}


def _setting(key: str) -> Any:
    return getattr(shared.opts, f"embedding_estimate_{key}")


class WebuiShell:
    """See `interfaces.api.Program`."""

    live = False

    def host(self) -> WebuiHost:
        family().loaded()
        return WebuiHost(locked=True)

    def checkpoint(self) -> str:
        return getattr(family().chosen_checkpoint(), "model_name", "")

    def checkpoints(self) -> Sequence[str]:
        return webui_checkpoints.titles()

    def on(self, checkpoints: Sequence[str]) -> Host:
        return webui_checkpoints.InTurn(checkpoints, locked=True)

    def embeddings_folder(self) -> str:
        return shared.cmd_opts.embeddings_dir

    def start_values(self) -> dict[str, Any]:
        return {key: _setting(key) for key in ("part", "subfolder", "memory")}

    def wrap(self, run: Callable, failed: Sequence[Any]) -> Callable:
        return call_queue.wrap_gradio_gpu_call(run, extra_outputs=list(failed))

    @contextmanager
    def turn(self, task: str) -> Iterator[None]:
        """As the webui runs the jobs of its own API."""
        progress.add_task_to_queue(task)
        with call_queue.queue_lock:
            shared.state.begin(job=task)
            progress.start_task(task)
            try:
                yield
            finally:
                progress.finish_task(task)
                shared.state.end()

    def accounts(self) -> list[tuple[str, str]] | None:
        """As of the webui's own API, which is there with --api, or alone with --nowebui."""
        options = shared.cmd_opts
        if not (options.api or getattr(options, "nowebui", False)):
            return None
        return [tuple(pair.split(":", 1)) for pair in options.api_auth.split(",")] if options.api_auth else []

    @contextmanager
    def reader(self) -> Iterator[WebuiText]:
        if not family().counts_tokens():
            raise ModelError("The webui has loaded no checkpoint yet, as it does for the first picture or estimate.")
        yield WebuiText(family().text_engines(), devices.cpu)

    def about(self) -> Mapping[str, str]:
        from modules import launch_utils  # asks git for the version

        flags = sorted(key for key, value in vars(shared.cmd_opts).items() if value is True)
        widths = {key: engine.table.shape[1] for key, engine in family().text_engines().items()}
        return {
            "host": f"{Path(paths_internal.script_path).name} {launch_utils.git_tag()}", "flags": ", ".join(flags),
            "checkpoint": f"{widths}, {devices.dtype}",
        }  # fmt: skip

    def show(self, view: Any) -> None:
        state = shared.state
        state.textinfo = view.short  # in one line
        state.job_count, state.job_no = 1, 0
        state.sampling_steps, state.sampling_step = PARTS_OF_PROGRESS, int(view.fraction * PARTS_OF_PROGRESS)
        if view.curve is not None:
            state.assign_current_image(view.curve)

    def interrupted(self) -> bool:
        return shared.state.interrupted or shared.state.stopping_generation

    def styles(self) -> Sequence[tuple[str, str, str]]:
        found = shared.prompt_styles.styles.values()
        return [(style.name, style.prompt or "", style.negative_prompt or "") for style in found]

    def saved(self, request: EstimateRequest, path: Path, picture: Any, description: str) -> None:
        family().refresh_embeddings()
        forget_conditionings()
        if _setting("card"):
            save_card(path, picture, description, overwrite=request.overwrite)

    def count_tokens(self, text: str, steps: int, negative: bool) -> str:
        from modules import ui  # not at the top: it is still being loaded when extensions are

        if not family().counts_tokens():
            return UNKNOWN
        counted = re.sub("<[^>]+>", "", ui.update_token_counter(text, steps, [], is_positive=not negative))
        return UNKNOWN if UNKNOWN in counted else counted

    def send_buttons(self) -> Sequence[str]:
        return ("txt2img", "img2img")

    def restore(self, task: str) -> Any:
        return progress.restore_progress(task)


def forget_conditionings() -> None:
    """Empties the webui's caches of encoded prompts, which go by the text and not by the vectors of its embeddings."""
    for owner in (processing.StableDiffusionProcessing, *processing.StableDiffusionProcessing.__subclasses__()):
        for name in CACHES:
            cache = owner.__dict__.get(name)
            if cache is not None:
                cache[:] = [None] * len(cache)


def save_card(path: Path, picture: Any, description: str, *, overwrite: bool) -> None:
    """`<name>.preview.png` and `<name>.json` beside an embedding, where none is or `overwrite`.

    A card that can't be written is logged: the embedding itself is saved by then.
    """
    try:
        image, about = path.with_name(path.stem + ".preview.png"), path.with_name(path.stem + ".json")
        if picture is not None and (overwrite or not image.exists()):
            _replace(image, lambda file: picture.save(file, format="PNG"))
        if overwrite or not about.exists():
            text = json.dumps({"description": description}, ensure_ascii=False, indent=4)
            _replace(about, lambda file: file.write_text(text, encoding="utf-8"))
    except OSError:
        log.exception("The card of %s was not saved", path)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = hidden(path.parent)
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
