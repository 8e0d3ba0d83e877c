"""What must hold of LoRAs inside the webui's process; see checks.py.

The LoRA is made here: it has red things drawn blue, by what the cross-attention layers make of the text, and changes
the first text encoder, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.hosts.webui_session import WebuiHost, WebuiSession
from lib_estimate.progress import Cancel, Interrupted, Note, StepReport
from lib_estimate.report.in_words import result_sentence
from lib_estimate.request import Part, Target, Use
from tests.webui.runs import fingerprint, outcome, picture, raised, request, unchanged_host
from tests.webui.webuis import changed

NAME, RANK = "checklora", 8
TAG, WORDS = f"<lora:{NAME}:1>", "a red circle"
RED = tuple(f"a {size}red {thing}{place} {{}}" for size in ("", "large ") for thing in ("circle", "square", "star")
            for place in ("", " on the left"))  # fmt: skip
KEPT = ("", "a green square", "a yellow star on a black background")


@contextmanager
def lora() -> Iterator[bool]:
    """In the webui's folder of LoRAs; False where it has none."""
    from modules import extra_networks, shared

    if "lora" not in extra_networks.extra_network_registry:
        yield False
        return
    import networks  # of the webui's own extension

    file = Path(shared.cmd_opts.lora_dir) / f"{NAME}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with WebuiHost(locked=False).session() as session, torch.no_grad():
        safetensors.torch.save_file(weights(session), file)
    networks.list_available_networks()
    try:
        yield True
    finally:
        picture(WORDS)  # without it: afterwards no LoRA is active
        file.unlink()
        networks.list_available_networks()


def weights(session: WebuiSession) -> dict[str, Tensor]:
    """For keys and values of text: M of rank `RANK` with red (I + M) = blue, and what is kept M = 0, at the least
    squared error."""
    texts = [text.format("") for text in RED]
    red, blue, kept = (
        torch.cat([session.encode([text]).hidden[0] for text in group])
        for group in (texts, [text.replace("red", "blue") for text in texts], KEPT)
    )
    given, wanted = torch.cat([red, kept]), torch.cat([blue - red, torch.zeros_like(kept)])
    square = given.T @ given
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), device=square.device)
    u, s, v = torch.linalg.svd(torch.linalg.solve(square + ridge, given.T @ wanted))
    left, right = (u[:, :RANK] * s[:RANK]).T, v[:RANK].T
    out: dict[str, Tensor] = {}

    def put(name: str, up: Tensor, down: Tensor) -> None:
        parts = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(float(len(down)))}
        out.update({f"{name}.{key}": part.cpu().float().clone().contiguous() for key, part in parts.items()})

    for name, module in session.unet.named_modules():
        if name.endswith(("to_k", "to_v")) and "attn2" in name:
            put(f"lora_unet_{name.replace('.', '_')}", module.weight.float() @ right, left)
    width, generator = next(iter(session.info.widths.values())), torch.Generator().manual_seed(0)
    up, down = (0.1 * torch.randn(shape, generator=generator) for shape in ((width, 2), (2, width)))
    put(f"lora_te{'' if len(session.info.widths) == 1 else 1}_text_model_encoder_layers_0_self_attn_v_proj", up, down)
    return out


def eps(tags: bool, networks: str = "") -> Tensor:
    """For the words, in a session with or without tags."""
    with WebuiHost(locked=False).session(tags=tags) as session, torch.no_grad():
        info = session.info
        x = torch.randn(1, info.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(info.device)
        t = torch.tensor([500], device=info.device)
        return session.predict_noise(x, t, session.encode([WORDS], networks=networks))


def losses_of_a_run() -> list[float]:
    return outcome(request(part=Part.UNET, steps=2, init="a blue square", optimizer="LBFGS")).losses


def check_a_lora_of_the_last_picture_is_learnt_with() -> dict[str, Any]:
    """It is active in the webui until a picture is made without it."""
    with lora() as there:
        if not there:
            return {"loras": False}
        usual = losses_of_a_run()
        picture(f"{WORDS} {TAG}")
        active = losses_of_a_run()
        picture(WORDS)
        assert losses_of_a_run() == usual
    assert abs(active[0] - usual[0]) > 0.01 * usual[0], (active, usual)
    return {"loras": True, "usual": usual[0], "active": active[0]}


def check_a_lora_is_at_work_where_it_is_named_as_in_a_picture() -> dict[str, Any]:
    """And nowhere else, though it is that of the last picture; which is active again afterwards."""
    with lora() as there:
        if not there:
            return {"loras": False}
        picture(WORDS)
        usual, named = eps(False), eps(True, TAG)
        assert torch.equal(eps(True), usual)
        picture(f"{WORDS} {TAG}")
        # With a LoRA in them, of what kind the tensors are depends on who had them loaded last.
        active, before = eps(False), fingerprint() | {"tensors": None}
        assert torch.equal(eps(True), usual)
        after = fingerprint() | {"tensors": None}
        assert after == before, [key for key in before if before[key] != after[key]]
        assert torch.equal(eps(False), active)
    apart, done = ((other - active).abs().max().item() for other in (named, usual))
    assert apart < 1e-5 < 1e-3 < done, (apart, done)
    return {"loras": True, "apart": apart, "done": done}


def check_a_word_takes_over_a_lora() -> dict[str, Any]:
    """Learnt while it is not at work, the word draws what the prompt draws with it; the report says how much."""
    with lora() as there:
        if not there:
            return {"loras": False}
        notes: list[str] = []
        made = request(
            prompt=f"{WORDS} {TAG}", take_over_lora=True, part=Part.AUTO, use=Use.ANYWHERE, steps=0, sampling_steps=10,
            images=2, width=128, height=128, sentence=(), trajectories=0,
        )  # fmt: skip
        done = outcome(made, see=lambda p: notes.append(p.text) if isinstance(p, Note) else None)
    fidelity = done.fidelity
    assert fidelity.reference == "without_lora"
    assert set(fidelity.pictures) == {"prompt", "embedding", "without_lora"}
    assert fidelity.picture_error < 0.6, fidelity
    assert fidelity.recovered > 0.3, fidelity
    assert any("the whole prompt" in note for note in notes), notes
    assert not any(TAG in note for note in notes), notes
    said = result_sentence(fidelity, "word")
    assert f"took over {100 * (1 - fidelity.picture_error):.0f}% of what the LoRA changes" in said, said
    return {"picture_error": fidelity.picture_error, "recovered": fidelity.recovered, "said": said}


def check_the_host_is_as_before_a_lora_was_taken_over() -> dict[str, Any]:
    """After success, an interrupt and an error, in the middle of the target or of learning."""
    with lora() as there:
        if not there:
            return {"loras": False}
        made = request(prompt=f"(red:1.3) circle {TAG}", take_over_lora=True, part=Part.AUTO, steps=1, overwrite=True)
        with unchanged_host():
            outcome(replace(made, images=1))
        with unchanged_host():
            for kind in (StepReport, object):
                cancel = Cancel()

                def drop(progress: Any, cancel: Cancel = cancel, kind: type = kind) -> None:
                    if isinstance(progress, kind):
                        cancel.discard()

                raised(Interrupted, lambda cancel=cancel, drop=drop: outcome(made, cancel, drop))
        with unchanged_host():
            predict = WebuiSession.predict_noise
            for during in (TAG, ""):

                def fail(self: Any, x: Tensor, t: Tensor, given: Any, during: str = during) -> Tensor:
                    if given.networks == during and len(x) > 1 - bool(during):
                        predict(self, x, t, given)
                        raise RuntimeError("on purpose")
                    return predict(self, x, t, given)

                with changed(WebuiSession, "predict_noise", fail):
                    assert raised(RuntimeError, lambda: outcome(made)) == "on purpose"
    return {"loras": True}


def check_a_lora_that_can_not_be_taken_over_is_refused() -> dict[str, str]:
    with lora() as there:
        if not there:
            return {"loras": False}
        made = request(prompt=WORDS, take_over_lora=True, part=Part.AUTO, steps=1, overwrite=True)
        said = {
            name: raised(RequestError, lambda other=other: outcome(other))
            for name, other in {
                "no tag": made,
                "unknown": replace(made, prompt=f"{WORDS} <lora:nowhere:1> {TAG}"),
                "after another": replace(made, prompt=f"{WORDS} {TAG} <lora:nowhere:1>"),
                "negative": replace(made, negative=f"blurry {TAG}", target=Target.NEGATIVE),
            }.items()
        }
    for name in ("unknown", "after another"):
        assert said[name].startswith("<lora:nowhere:1> changes nothing"), said
    return said
