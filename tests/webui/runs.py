"""What the checks do inside the webui's process: estimates, its own generations, and looks at what is left behind."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lib_estimate import job
from lib_estimate.hosts.webui_session import WebuiHost
from lib_estimate.progress import Cancel
from lib_estimate.request import EstimateRequest, Part, Use
from tests.webui import webuis

PICTURE = {"steps": 4, "seed": 7}


def request(**changes: Any) -> EstimateRequest:
    """A short request on small latents, into a folder of its own."""
    base = EstimateRequest(
        prompt="(red:1.6) circle", name="webui-check", out=tempfile.mkdtemp(), use=Use.WHOLE, part=Part.CROSS_ATTENTION,
        steps=3, sampling_steps=4, trajectories=1, images=0, seed=1, sentence=("a photo of {}",), width=64, height=64,
    )  # fmt: skip
    return replace(base, **changes)


def outcome(made: EstimateRequest, cancel: Cancel | None = None, see: Callable = lambda _: None) -> job.Outcome:
    for progress in job.estimate(made, WebuiHost(locked=False), cancel):
        see(progress)
    return progress


def picture(prompt: str, negative: str = "") -> torch.Tensor:
    """Pixels `[H, W, 3]` of the webui's own txt2img."""
    import numpy as np

    return torch.from_numpy(np.asarray(generation(prompt, negative).images[0]).copy())


def generation(prompt: str, negative: str = "") -> Any:
    """What the webui's own txt2img makes: `images`, and in `info` what is written into them."""
    from modules import call_queue, processing, shared

    model = shared.sd_model
    p = processing.StableDiffusionProcessingTxt2Img(
        sd_model=model, prompt=prompt, negative_prompt=negative, width=128, height=128, cfg_scale=5.0,
        sampler_name="Euler", do_not_save_samples=True, do_not_save_grid=True, **PICTURE,
    )  # fmt: skip
    with call_queue.queue_lock:
        shared.state.begin(job="check")
        try:
            return processing.process_images(p)
        finally:
            shared.state.end()


def raised(kind: type[Exception], use: Callable[[], Any]) -> str:
    """What the error of this kind says that `use` must end with."""
    try:
        use()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def harm(use: Callable[[], Any]) -> str:
    """What is said by the error that `use` must end with, and by those that it came from."""
    try:
        use()
    except Exception as error:  # noqa: BLE001 (the caller reads which it was)
        said, last = [], error
        while last is not None and str(last) not in said:
            said.append(str(last))
            last = last.__cause__ or last.__context__
        return "; ".join(said)
    raise AssertionError("no harm done")


def fingerprint() -> dict[str, Any]:
    """All of the host's that a run could leave changed."""
    from modules import shared

    this, digest = webuis.this(), hashlib.sha256()
    networks, databases = this.networks(), this.databases()
    modules = [module for network in networks for module in network.modules()]
    parameters = [parameter for network in networks for parameter in network.parameters()]
    for network in networks:
        for name, tensor in sorted(network.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return {
        "weights": digest.hexdigest(),
        "tensors": this.tensors(),
        "training": [m.training for m in modules],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules],
        "gradients": [p.is_leaf and not p.is_inference() and p.grad is not None for p in parameters],
        "options": dict(shared.opts.data),
        "embeddings": [sorted(database.word_embeddings) for database in databases],
        "lookup": [{key: [ids for ids, _ in rows] for key, rows in d.ids_lookup.items()} for d in databases],
        **this.left_behind(),
    }


@contextmanager
def unchanged_host() -> Iterator[None]:
    """The host is as before, and a generation gives the same pixels."""
    drawn = picture("a (red:1.4) circle, blue background", "a square")
    before = fingerprint()  # after the picture: libraries put in hooks of their own at the first use
    yield
    gc.collect()
    after = fingerprint()
    assert before == after, [key for key in before if before[key] != after[key]]
    assert torch.equal(drawn, picture("a (red:1.4) circle, blue background", "a square"))


def state() -> dict[str, str]:
    """The fingerprint in short, for who looks from outside."""
    return {key: hashlib.sha256(repr(value).encode()).hexdigest() for key, value in fingerprint().items()}


def restart() -> dict[str, Any]:
    """Apply and restart UI."""
    from modules import shared

    shared.state.request_restart()
    return {}
