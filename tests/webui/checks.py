"""What must hold inside the webui's process, one function each.

They run in a real webui, called through a route of an extension the tests add to it, and over the stand-ins where there
is none. A check raises AssertionError, or returns figures. Those of the webuis' traps are in checks_traps.py, of
the HTTP API in checks_api.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lib_estimate import job
from lib_estimate.errors import EstimateError, OutOfMemory
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.family import family
from lib_estimate.hosts.webui_session import WebuiHost, WebuiSession
from lib_estimate.hosts.webui_shell import WebuiShell
from lib_estimate.learn.objectives.cross_attention import CrossAttention
from lib_estimate.learn.objectives.denoising import Denoising
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.measuring import measured
from lib_estimate.progress import Cancel, Interrupted, Note, StepReport
from lib_estimate.report.inside import look_inside
from lib_estimate.request import Part
from lib_estimate.target.target import build_target
from tests.webui import checks_api, checks_checkpoints, checks_lora, checks_traps, webuis
from tests.webui.runs import outcome, picture, raised, request, restart, state, unchanged_host
from tests.webui.webuis import changed

PROMPTS = (
    "a red circle",
    "a (red:1.6) circle",
    "((red)) circle on a [blue] background",
    "[a red circle:a blue square:0.5]",
    "[red|blue] circle",
    "a red circle AND a (blue:1.3) square :0.7",
    "a red circle BREAK a (blue:1.3) background",
    "a (large:0.7) red circle, " * 20,
)
STEPS = 10


# ---- the target ---------------------------------------------------------------------------------------------------


def told(conditioning: Any) -> list[torch.Tensor]:
    """What a conditioning of the webui's holds: the hidden states, and SDXL's vector of pooled states and sizes."""
    if isinstance(conditioning, dict):
        return [conditioning["crossattn"], conditioning["vector"]]
    return [conditioning]


def check_targets_are_what_the_sampler_gets() -> dict[str, float]:
    """At every step, for every part of AND, and for the negative prompt; SDXL's pooled vector and sizes are part of it.

    The webui encodes an alternation's texts once for each step, which may round differently: nothing else may differ.
    """
    from modules import devices, prompt_parser, shared

    largest = 0.0
    for prompt in (*PROMPTS, ""):
        with WebuiHost(locked=False).session() as session, torch.no_grad(), devices.autocast():
            made = request(prompt=prompt or "x", negative=prompt, sampling_steps=STEPS)
            target = build_target(made, session)
            x = torch.zeros(1, session.info.latent_channels, *[made.width // session.info.latent_scale] * 2)
            batches = [
                prompt_parser.SdConditioning([text], is_negative_prompt=negative, width=made.width, height=made.height)
                for text, negative in ((made.prompt, False), (prompt, True))
            ]
            multi = prompt_parser.get_multicond_learned_conditioning(shared.sd_model, batches[0], STEPS)
            single = prompt_parser.get_learned_conditioning(shared.sd_model, batches[1], STEPS)
            for step, ours in enumerate(target.guidance):
                parts, theirs = prompt_parser.reconstruct_multicond_batch(multi, step)
                weights = [weight for _, weight in parts[0]]
                assert weights == [weight for weight, _ in ours.positive], (prompt, step)
                negative = prompt_parser.reconstruct_cond_batch(single, step)
                pairs = [(c, index, theirs) for (index, _), (_, c) in zip(parts[0], ours.positive, strict=True)]
                for conditioning, index, whole in [*pairs, (ours.negative, 0, negative)]:
                    mine = [conditioning.hidden[0]]
                    if conditioning.pooled is not None:
                        mine.append(session._vector(x, conditioning)[0])
                    host = [each[index] for each in told(whole)]
                    for a, b in zip(mine, host, strict=True):
                        length = min(len(a), len(b))  # the webui fills up shorter prompts later
                        largest = max(largest, (a[:length] - b[:length].float()).abs().max().item())
    assert largest < 1e-5, largest
    return {"largest_difference": largest}


def check_texts_of_their_own_are_normalised_on_their_own() -> dict[str, float]:
    """Texts encoded in one call are as if encoded alone, unless they are one prompt's schedule."""
    texts = ["a (red:1.6) circle", "a (blue:0.5) square"]
    with WebuiHost(locked=False).session() as session, torch.no_grad():
        alone = torch.cat([session.encode([text]).hidden for text in texts])
        apart = (session.encode(texts).hidden - alone).abs().max().item()
        schedule = (session.encode(texts, together=True).hidden - alone).abs().max().item()
    assert apart < 1e-5, apart
    assert schedule > 1e-3, schedule
    return {"apart": apart, "together": schedule}


def check_the_unet_is_the_samplers() -> dict[str, float]:
    """The eps of the session is what the webui's own denoiser gives."""
    from modules import prompt_parser, shared

    text, this = "a (red:1.4) circle", webuis.this()
    with WebuiHost(locked=False).session() as session, torch.no_grad():
        info = session.info
        x = torch.randn(2, info.latent_channels, 16, 16, generator=torch.Generator().manual_seed(0)).to(info.device)
        t = torch.tensor([100, 700], device=info.device)
        ours = session.predict_noise(x, t, session.encode([text]))
        size = {"width": 16 * info.latent_scale, "height": 16 * info.latent_scale}
        given = shared.sd_model.get_learned_conditioning(prompt_parser.SdConditioning([text] * 2, **size))
        theirs = this.own_eps(session, x, t, given)
    difference = (ours - theirs.float()).abs().max().item()
    assert difference < 1e-4, difference
    return {"largest_difference": difference}


# ---- learning -----------------------------------------------------------------------------------------------------


def check_every_part_learns() -> dict[str, float]:
    """Each part lowers its own loss on the webui's networks, and no weight gets a gradient."""
    figures = {}
    for part in (Part.TRANSFORMER, Part.CROSS_ATTENTION, Part.UNET):
        losses = outcome(request(part=part, steps=3, init="a blue square", optimizer="LBFGS")).losses
        assert losses[-1] < 0.9 * losses[0], (part, losses)
        figures[part.value] = losses[-1] / losses[0]
    assert all(p.grad is None for network in webuis.this().networks() for p in network.parameters())
    return figures


def check_a_cut_gradient_path_is_seen() -> dict[str, Any]:
    """The check above can fail: with the vectors detached on their way in, nothing is learnt."""
    encode = WebuiSession.encode

    def cut(self: Any, texts: Any, vectors: Any = None, **given: Any) -> Any:
        return encode(self, texts, vectors and {k: v.detach() for k, v in vectors.items()}, **given)

    with changed(WebuiSession, "encode", cut):
        said = raised(RuntimeError, lambda: outcome(request(steps=8, init="a blue square", optimizer="LBFGS")))
    assert "grad" in said, said
    return {}


def check_estimate() -> dict[str, Any]:
    """All stages for a whole prompt, briefly; the saved file measures as the run said. The caller compares further."""
    settings = {"prompt": "(a red circle:1.5)", "seed": 1, "sampling_steps": 6, "steps": 15, "patience": 0}
    made = request(**settings, part=Part.AUTO, width=128, height=128)
    done = outcome(made)
    *_, found = measured(reading.load(done.path), made, WebuiHost(locked=False))
    assert abs(found.recovered - done.fidelity.recovered) < 1e-3, (found, done.fidelity)
    assert found.error < found.unweighted_error, found
    return {
        "settings": settings, "file": str(done.path), "seconds": done.record["seconds"],
        "recovered": found.recovered, "error": found.error, "unweighted_error": found.unweighted_error,
    }  # fmt: skip


def check_short_run() -> dict[str, Any]:
    """A few steps of every part: the caller compares the vectors with its own."""
    settings = {"prompt": "a (red:1.6) circle", "seed": 1, "sampling_steps": 6, "steps": 4, "trajectories": 1}
    settings |= {"images": 0, "width": 64, "height": 64}
    parts = (Part.TRANSFORMER, Part.CROSS_ATTENTION, Part.UNET, Part.AUTO)
    files = {part.value: str(outcome(request(**settings, part=part, sentence=())).path) for part in parts}
    return {"settings": settings, "files": files}


def check_every_attention_optimization_learns() -> dict[str, float]:
    """Whichever of the webui's attention optimizations is on."""
    figures = {}
    for name in webuis.this().attention_optimizations():
        for part in (Part.CROSS_ATTENTION, Part.UNET):
            losses = outcome(request(part=part, steps=2, init="a blue square", optimizer="LBFGS")).losses
            assert losses[-1] < losses[0], (name, part, losses)
            figures[f"{name} {part.value}"] = losses[-1] / losses[0]
    return figures


# ---- saving and using ---------------------------------------------------------------------------------------------


def check_a_saved_name_works_at_once() -> dict[str, float]:
    """Saved into the embeddings folder the name changes the picture, and changes it again when it is overwritten."""
    from modules import shared

    shell, name, pictures = WebuiShell(), "checkname", []
    made = request(name=name, out=shell.embeddings_folder(), overwrite=True, steps=2)
    folder = job.check_destination(made).parent
    try:
        pictures.append(picture(name))
        for text in ("a red circle on a white background", "a blue square on a black background"):
            done = outcome(replace(made, prompt=text))
            shell.saved(replace(made, prompt=text), done.path, None, "a description")
            assert all(name in database.word_embeddings for database in webuis.this().databases())
            pictures.append(picture(name))
        apart = [(a.float() - b.float()).abs().mean().item() for a, b in pairwise(pictures)]
        assert min(apart) > 2, apart
        assert (folder / f"{name}.json").exists()
    finally:
        for file in folder.glob(f"{name}.*"):
            file.unlink()
        family().refresh_embeddings()
    assert shared.state.job == ""
    return {"first": apart[0], "overwritten": apart[1]}


def check_overwriting_replaces_that_file_alone() -> dict[str, Any]:
    """Whatever its format and folder; without the checkbox the name is refused before anything starts."""
    folder = Path(tempfile.mkdtemp())
    first = folder / "deep" / "Taken.safetensors"
    with WebuiHost(locked=False).session() as session:
        zeros = {key: torch.zeros(1, width) for key, width in session.info.widths.items()}
    writing.save(Embedding("Taken", zeros, {}), first)
    made = request(name="taken", out=str(folder))
    assert "Taken.safetensors" in raised(EstimateError, lambda: outcome(made))
    done = outcome(replace(made, overwrite=True))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files == [first] == [done.path], files
    assert all(rows.abs().sum() > 0 for rows in reading.load(first).vectors.values())
    return {}


def check_a_card_is_replaced_only_where_asked() -> dict[str, Any]:
    from PIL import Image

    shell, path, said = WebuiShell(), Path(tempfile.mkdtemp()) / "carded.pt", []
    for text, overwrite in (("first", False), ("second", False), ("third", True)):
        shell.saved(request(overwrite=overwrite), path, Image.new("RGB", (8, 8)), text)
        said.append(json.loads(path.with_name("carded.json").read_text(encoding="utf-8"))["description"])
    assert said == ["first", "first", "third"], said
    assert path.with_name("carded.preview.png").exists()
    return {}


# ---- the host afterwards ------------------------------------------------------------------------------------------


def check_a_run_holds_the_queue() -> dict[str, Any]:
    """Nothing else of the webui's runs beside it, and afterwards everything may."""
    from modules import call_queue

    def free() -> bool:
        if not call_queue.queue_lock.acquire(blocking=False):
            return False
        call_queue.queue_lock.release()
        return True

    seen: list[bool] = []
    outcome(request(), see=lambda progress: None if isinstance(progress, job.Outcome) else seen.append(free()))
    assert seen, "no progress"
    assert not any(seen), seen
    assert free()
    return {}


def check_the_host_is_as_before_after_success() -> dict[str, Any]:
    with unchanged_host():
        outcome(request(part=Part.AUTO, steps=4, images=1))
        outcome(request(part=Part.UNET, prompt="a red circle AND a (blue:1.3) square"))
    return {}


def check_the_host_is_as_before_after_interrupts() -> dict[str, Any]:
    with unchanged_host():
        cancel = Cancel()

        def stop(progress: Any) -> None:
            if isinstance(progress, StepReport):
                cancel.save()

        done = outcome(request(steps=500, part=Part.UNET), cancel, stop)
        assert done.path.exists()
        assert done.record["steps_run"] < 10
        cancel = Cancel()

        def drop(progress: Any) -> None:
            if isinstance(progress, StepReport):
                cancel.discard()

        made = request(steps=500, part=Part.UNET)
        raised(Interrupted, lambda: outcome(made, cancel, drop))
        assert not list(Path(made.out).iterdir())
    return {}


def check_the_host_is_as_before_after_errors() -> dict[str, Any]:
    """An error, and out of memory, in the middle of learning."""
    for part, owner in (
        (Part.CROSS_ATTENTION, CrossAttention),
        (Part.UNET, Denoising),
        (Part.TRANSFORMER, HiddenState),
    ):
        made = request(part=part)
        with unchanged_host():
            for error in (RuntimeError, torch.cuda.OutOfMemoryError):

                def fail(*_: Any, error: type[Exception] = error) -> None:
                    raise error("on purpose")

                full = error is torch.cuda.OutOfMemoryError
                kind, words = (OutOfMemory, "memory is full") if full else (error, "on purpose")
                with changed(owner, "losses", fail):
                    assert words in raised(kind, lambda made=made: outcome(made))
        assert all(path.name.startswith(".") for path in Path(made.out).iterdir())  # from where to go on
    return {}


# ---- what is refused ----------------------------------------------------------------------------------------------


def check_what_does_not_work_is_refused_with_a_way_round() -> dict[str, str]:
    said = {}
    for name, in_place in webuis.this().refused().items():
        with in_place:
            said[name] = raised(EstimateError, lambda: outcome(request()))
    said["prompt"] = raised(EstimateError, lambda: outcome(request(prompt="a (b:1.5.2) c")))
    assert all(sentence.endswith(".") for sentence in said.values()), said
    return said


def check_options_of_emphasis_and_clip_skip_are_the_hosts() -> dict[str, Any]:
    from modules import shared

    def encoded() -> torch.Tensor:
        with WebuiHost(locked=False).session() as session, torch.no_grad():
            return session.encode(["(red:1.6) circle"]).hidden

    usual = encoded()
    for options in ([("emphasis", "No norm")], [("emphasis", "Ignore")], webuis.this().clip_skip()):
        with ExitStack() as stack:
            for name, value in options:
                stack.enter_context(changed(shared.opts, name, value))
            assert not torch.equal(encoded(), usual), options
    assert torch.equal(encoded(), usual)
    return {}


def check_lora_tags_are_left_out_and_said() -> dict[str, Any]:
    prompt, notes = "a (red:1.5) circle <lora:some:0.8>", []
    with WebuiHost(locked=False).session() as session:
        texts = [text for part in session.read(prompt, STEPS) for _, text in part.texts]
    assert not any("lora" in text for text in texts), texts
    outcome(
        request(prompt=prompt),
        see=lambda progress: notes.append(progress.text) if isinstance(progress, Note) else None,
    )
    assert any("<lora:some:0.8>" in note for note in notes), notes
    return {}


def check_an_embedding_of_another_model_is_said_before_the_run() -> dict[str, Any]:
    path = Path(WebuiShell().embeddings_folder()) / "foreignword.pt"
    writing.save(Embedding(path.stem, {"clip_l": torch.zeros(1, 8)}, {}), path)
    try:
        family().refresh_embeddings()
        for change in ({"prompt": "a (red:1.6) foreignword circle"}, {"init": "foreignword"}):
            first = next(iter(job.estimate(request(**change), WebuiHost(locked=False))))
            assert "foreignword was made for another kind of model (width 8;" in first.text, first
    finally:
        path.unlink()
        family().refresh_embeddings()
    return {}


def check_the_styles_are_listed() -> dict[str, Any]:
    """With what is missing empty, as in the dividers that the webui puts between files of styles."""
    from types import SimpleNamespace

    from modules import shared

    styles = shared.prompt_styles.styles
    styles["check"] = SimpleNamespace(name="check", prompt=None, negative_prompt="blurry")
    try:
        assert ("check", "", "blurry") in WebuiShell().styles()
    finally:
        del styles["check"]
    return {}


def check_a_weight_on_a_saved_embedding_is_as_on_the_words_it_stands_for() -> dict[str, float]:
    """And a look into it finds those words."""
    texts = ("a (twowords:1.4) circle", "a (large red:1.4) circle", "a twowords circle")
    with WebuiHost(locked=False).session() as session:
        rows = {key: r.cpu() for key, r in session.token_vectors("large red").items()}
    path = Path(WebuiShell().embeddings_folder()) / f"twowords.{'pt' if len(rows) == 1 else 'safetensors'}"
    writing.save(Embedding(path.stem, rows, {}), path)
    try:
        family().refresh_embeddings()
        with WebuiHost(locked=False).session() as session, torch.no_grad():
            word, words, plain = (session.encode([text]).hidden for text in texts)
            looks = look_inside(rows, session.words())
    finally:
        path.unlink()
        family().refresh_embeddings()
    apart, done = ((other - word).abs().mean().item() for other in (words, plain))
    assert apart < 0.01 * done, (apart, done)
    for look in looks.values():
        assert [vector.words[0][0] for vector in look.vectors] == ["large", "red"], look
    return {"apart": apart, "done": done}


CHECKS: dict[str, Callable[..., dict[str, Any]]] = {
    name.removeprefix("check_"): function
    for file in (globals(), *map(vars, (checks_checkpoints, checks_lora, checks_traps, checks_api)))
    for name, function in list(file.items())
    if name.startswith("check_")
}
CHECKS |= {"state": state, "restart": restart}  # what tests of the real webui ask for by themselves
