"""What must hold of measuring on several checkpoints inside the webui's process; see checks.py.

The other checkpoint is made here: the loaded one, told twice as much by the keys of its first cross-attention layers.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lib_estimate.errors import EstimateError
from lib_estimate.files import reading
from lib_estimate.hosts import webui_checkpoints
from lib_estimate.hosts.family import family
from lib_estimate.measuring import measured
from lib_estimate.progress import Note, Phase
from tests.webui import webuis
from tests.webui.runs import outcome, picture, raised, request

NAME, WORDS = "checkother", "a (red:1.4) circle, blue background"


@contextmanager
def other_checkpoint() -> Iterator[bool]:
    """In the webui's list; False where the loaded one is no single file."""
    from modules import sd_models

    family().loaded()
    file = Path(family().chosen_checkpoint().filename)
    if file.is_dir():
        yield False
        return
    folder = Path(tempfile.mkdtemp())
    weights = load_file(file)
    for key in weights:
        if key.endswith("attn2.to_k.weight") and "input_blocks" in key:
            weights[key] = 2 * weights[key]
    save_file(weights, folder / f"{NAME}.safetensors")
    if file.with_suffix(".yaml").exists():
        shutil.copy(file.with_suffix(".yaml"), folder / f"{NAME}.yaml")
        if (file.parent / "tokenizer").exists():
            shutil.copytree(file.parent / "tokenizer", folder / "tokenizer")
    sd_models.CheckpointInfo(str(folder / f"{NAME}.safetensors")).register()
    try:
        yield True
    finally:
        sd_models.list_models()


def titled(name: str) -> str:
    return next(title for title in webui_checkpoints.titles() if name in title)


def check_a_word_is_measured_on_one_checkpoint_after_the_other() -> dict[str, Any]:
    """With a row for each, and the chosen one is there again."""
    done = outcome(request())
    with other_checkpoint() as there:
        if not there:
            return {"file": False}
        before, drawn = webuis.this().loaded().sd_checkpoint_info.filename, picture(WORDS)
        own = Path(before).stem
        host = webui_checkpoints.InTurn([titled(NAME), titled(own)], locked=False)
        *_, found = measured(reading.load(done.path), request(), host)
        assert webuis.this().loaded().sd_checkpoint_info.filename == before
        assert torch.equal(drawn, picture(WORDS))
        rows = {row.name: row.fidelity for row in found.checkpoints}
        assert list(rows) == [NAME, own], list(rows)
        assert abs(rows[own].error - done.fidelity.error) < 1e-3 * done.fidelity.error + 1e-6, rows
        assert abs(rows[NAME].error - rows[own].error) > 1e-3 * rows[own].error, rows
    return {"file": True, "errors": {name: fidelity.error for name, fidelity in rows.items()}}


def check_a_checkpoint_that_is_gone_is_said_and_the_chosen_one_is_there() -> dict[str, Any]:
    done = outcome(request())
    with other_checkpoint() as there:
        if not there:
            return {"file": False}
        before = webuis.this().loaded().sd_checkpoint_info.filename
        gone = webui_checkpoints.InTurn(["gone.safetensors"], locked=False)
        said = raised(EstimateError, lambda: list(measured(reading.load(done.path), request(), gone)))
        host = webui_checkpoints.InTurn([titled(NAME), "gone.safetensors"], locked=False)
        *progress, found = measured(reading.load(done.path), request(), host)
        notes = [each.text for each in progress if isinstance(each, Note)]
        assert any("gone.safetensors" in note for note in notes), notes
        assert [row.name for row in found.checkpoints] == [NAME]
        assert webuis.this().loaded().sd_checkpoint_info.filename == before
    return {"file": True, "said": said}


def check_a_checkpoint_chosen_meanwhile_is_the_one_that_stays() -> dict[str, Any]:
    """Forge notes another choice at once, whatever runs; in the others it waits for the queue."""
    done = outcome(request())
    with other_checkpoint() as there:
        if not there or not hasattr(family(), "sd_models") or not hasattr(family().sd_models, "forge_model_reload"):
            return {"at once": False}
        data, before = family().sd_models.model_data, family().chosen_checkpoint()
        own, other = titled(Path(before.filename).stem), titled(NAME)
        chosen = family().sd_models.checkpoint_aliases[other]
        running = measured(reading.load(done.path), request(), webui_checkpoints.InTurn([own], locked=False))
        for progress in running:
            if isinstance(progress, Phase):
                data.forge_loading_parameters = {**data.forge_loading_parameters, "checkpoint_info": chosen}
        assert webuis.this().loaded().sd_checkpoint_info is chosen
        family().use_checkpoint(before)
    return {"at once": True}
