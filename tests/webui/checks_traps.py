"""One check for each trap that a webui has for whoever learns in it: that the cure works, and that it is needed.

Where this webui has the trap, the check also takes the cure away and must then see the harm; `trap` among its figures
says whether it did. Where the webui has not, it says so, and the first half is what is left.
"""

from __future__ import annotations

import html
import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lib_estimate.errors import EmbeddingFileError, EstimateError, ModelError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts import denoising, webui_shell
from lib_estimate.hosts import family as families
from lib_estimate.hosts.base import PLACEHOLDER, Conditioning
from lib_estimate.hosts.family import family
from lib_estimate.hosts.lending import Views
from lib_estimate.hosts.webui_session import WebuiHost, WebuiSession
from lib_estimate.hosts.webui_shell import WebuiShell
from lib_estimate.interfaces.fields import in_the_tab
from lib_estimate.interfaces.tab import Tab
from lib_estimate.request import Part
from tests.webui import webuis
from tests.webui.runs import generation, harm, outcome, picture, raised, request
from tests.webui.webuis import changed

TEXT = "a (red:1.4) circle"


@contextmanager
def session() -> Iterator[WebuiSession]:
    with WebuiHost(locked=False).session() as one:
        yield one


def latents(one: WebuiSession) -> Tensor:
    side = 64 // one.info.latent_scale
    noise = torch.randn(1, one.info.latent_channels, side, side, generator=torch.Generator().manual_seed(0))
    return noise.to(one.info.device)


def eps(one: WebuiSession, given: Conditioning) -> Tensor:
    return one.predict_noise(latents(one), torch.tensor([500], device=one.info.device), given)


def gradient(one: WebuiSession) -> Tensor:
    """Through the whole U-Net, to what the text was encoded to."""
    with torch.no_grad():
        encoded = one.encode([TEXT])
    hidden = encoded.hidden.detach().requires_grad_()
    return torch.autograd.grad(eps(one, Conditioning(hidden, encoded.pooled)).square().sum(), hidden)[0]


# ---- weights ------------------------------------------------------------------------------------------------------


def of_inference_mode() -> list[Part]:
    """The parts that learn through weights of inference mode, if any."""
    model = family().loaded()
    if any(engine.table.is_inference() for engine in model.engines.values()):
        return [Part.TRANSFORMER, Part.CROSS_ATTENTION, Part.UNET]
    unet = any(parameter.is_inference() for parameter in model.unet.parameters())
    return [Part.CROSS_ATTENTION, Part.UNET] if unet else []


def check_weights_of_inference_mode_need_views() -> dict[str, Any]:
    """That each part learns with them is another check; without them none does."""
    trapped = of_inference_mode()
    flags = [(p, p.requires_grad) for network in webuis.this().networks() for p in network.parameters()]
    with changed(Views, "put", lambda self: None):
        for part in trapped:
            said = harm(lambda part=part: outcome(request(part=part)))
            assert "cannot be saved for backward" in said, said
            with torch.inference_mode():  # where alone it can be set back
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)
    return {"trap": [part.value for part in trapped]}


def check_what_blocks_add_to_in_place_is_kept() -> dict[str, Any]:
    """With the copies the U-Net says the same, and has a gradient; without them it has none."""
    with session() as one:
        trap = adds_in_place(one)
        with torch.no_grad():
            encoded = one.encode([TEXT])
            plain = eps(one, encoded)
        hidden = encoded.hidden.detach().requires_grad_()
        with_gradient = eps(one, Conditioning(hidden, encoded.pooled)).detach()
        assert torch.allclose(plain, with_gradient, atol=1e-6), (plain - with_gradient).abs().max()
    if trap:
        with changed(family(), "kept_for_the_gradient", lambda unet: nullcontext()):
            said = harm(lambda: outcome(request(part=Part.UNET)))
        assert "inplace operation" in said, said
    return {"trap": trap}


def adds_in_place(one: WebuiSession) -> bool:
    """Whether the first transformer block changes the tensor that it is given."""
    block = next(module for module in one.unet.modules() if getattr(module, "attn2", None) is not None)
    seen: list[Any] = []
    handles = [
        block.register_forward_pre_hook(lambda _, given: seen.extend((given[0], given[0]._version))),
        block.register_forward_hook(lambda *_: seen.append(seen[0]._version)),
    ]
    with torch.no_grad():
        eps(one, one.encode([TEXT]))
    for handle in handles:
        handle.remove()
    return seen[2] > seen[1]


def check_recomputing_gives_the_same_gradient() -> dict[str, Any]:
    """A block that adds to its own input must be run again from what it was given, not from what it made of it."""

    def difference() -> float:
        with session() as one:
            plain = gradient(one)
            assert one.save_memory()
            return ((gradient(one) - plain).abs().max() / plain.abs().max()).item()

    with session() as one:
        trap = adds_in_place(one)
    figures = {"trap": trap, "difference": difference()}
    assert figures["difference"] < 1e-4, figures
    if trap:
        with changed(
            denoising.Recomputed, "_of_a_clone", staticmethod(lambda run, *given, **named: run(*given, **named))
        ):
            try:
                without = difference()
            except RuntimeError:  # newer torch sees what happens
                without = float("inf")
        assert without > 1e-2, without
    return figures


def check_a_gradient_after_a_decoding() -> dict[str, Any]:
    """To decode, a memory management may move the networks: the views must not be in their place meanwhile."""
    with session() as one:
        before, place = gradient(one), next(one.unet.parameters()).data_ptr()
        with torch.no_grad():
            one.decode(latents(one))
        assert torch.allclose(gradient(one), before, rtol=1e-4, atol=1e-6 * before.abs().max().item())
        trap = next(one.unet.parameters()).data_ptr() != place
    if trap:
        with changed(type(family().loaded()), "returned", lambda self: nullcontext()), session() as one:
            gradient(one)
            one.decode(latents(one))
            said = harm(lambda: gradient(one))
        assert "nference tensor" in said, said
    return {"trap": trap}


def check_a_picture_after_weights_were_moved() -> dict[str, Any]:
    """Weights of inference mode that are moved outside of it are lost for the webui: nothing multiplies them any more.

    The harm is done on purpose only where the webui can load the checkpoint anew.
    """
    with session() as one:
        gradient(one)
        place = next(one.unet.parameters()).data_ptr()
        one.decode(latents(one))
        gradient(one)
        moved = next(one.unet.parameters()).data_ptr() != place
    picture("a red circle, moved")
    states = webuis.this().without_model()
    trap = moved and bool(of_inference_mode()) and bool(states)
    if trap:
        kind = type(family().loaded())
        with changed(kind, "_load", kind._load.__wrapped__), session() as one:
            gradient(one)
            one.decode(latents(one))
            gradient(one)
        said = harm(lambda: picture("a red circle, moved again"))
        assert "nference tensor" in said, said
        with states[0], session():
            pass
    return {"trap": trap}


def check_the_unets_own_options_stay_empty() -> dict[str, Any]:
    """Called without options, a U-Net writes into the ones that all such calls share."""
    with session() as one, torch.no_grad():
        parameter = inspect.signature(type(one.unet).forward).parameters.get("transformer_options")
        if parameter is None or parameter.default is None:
            return {"trap": False}
        common, given = parameter.default, one.encode([TEXT])
        before = dict(common)
        eps(one, given)
        assert common == before, common
        vector = one._vector(latents(one), given)
        common.clear()
        one.unet(latents(one), torch.tensor([500.0], device=one.info.device), context=given.hidden, y=vector)
        trap = bool(common)
        common.clear()
        common.update(before)
    return {"trap": trap}


def check_weights_of_another_format_are_left_alone_and_named() -> dict[str, Any]:
    """Views leave them alone. Where they have no gradient, a run is refused and says what they are; where the layer
    has one, it learns."""
    if not webuis.this().names_weights:
        return {"trap": False}

    class PackedParameter(nn.Parameter):
        """As quantised weights: of a type of their own."""

    attention = denoising.attention_modules(family().loaded().unet)[-1]  # what enters the first has no gradient
    layer = next(module for module in attention.modules() if getattr(module, "weight", None) is not None)
    whole = layer._parameters["weight"]
    try:
        for learnable in (False, True):
            with torch.inference_mode(not learnable):
                packed = PackedParameter(whole.detach().clone(), requires_grad=False)
            layer._parameters["weight"] = packed
            with session():
                assert layer._parameters["weight"] is packed
            if learnable:
                losses = outcome(request(init="a blue square", optimizer="LBFGS")).losses
                assert losses[-1] < losses[0], losses
            else:
                said = raised(ModelError, lambda: outcome(request(part=Part.UNET)))
                assert "PackedParameter" in said, said
    finally:
        layer._parameters["weight"] = whole
    return {"trap": True}


# ---- the model ----------------------------------------------------------------------------------------------------


def check_a_run_loads_the_chosen_checkpoint() -> dict[str, Any]:
    """Where none is there yet, or none after a load that failed. Till then there is nothing to count tokens with."""
    shell, met = WebuiShell(), []
    for state in webuis.this().without_model():
        with state as name:
            assert not family().counts_tokens()
            assert shell.count_tokens(TEXT, 4, False) == "?"
            shell.host()
        assert family().counts_tokens()
        met.append(name)
    with session() as one:
        count = len(one.token_ids("a_red_circle"))
    assert count > 1
    assert shell.count_tokens("a_red_circle", 4, False).startswith(f"{count}/")
    return {"trap": met}


def check_an_unknown_webui_is_told_by_its_folder() -> dict[str, Any]:
    from modules import paths_internal

    with changed(families, "FAMILIES", {}):
        said = raised(ModelError, families.family)
    assert said.startswith(f"{Path(paths_internal.script_path).name} is no webui that is known here"), said
    return {"said": said}


# ---- files and embeddings -----------------------------------------------------------------------------------------


def check_a_damaged_file_keeps_its_name() -> dict[str, Any]:
    """Forge's own ways to read a file rename one that they fail on."""
    folder = Path(tempfile.mkdtemp())
    files = [folder / "damaged.pt", folder / "damaged.safetensors"]
    for file in files:
        for content in (b"PK\x03\x04 and then nothing", b"neither"):
            file.write_bytes(content)
            raised(EmbeddingFileError, lambda file=file: reading.load(file))
    assert sorted(folder.iterdir()) == files, list(folder.iterdir())
    trap = hasattr(torch, "load_origin")
    if trap:
        harm(lambda: torch.load(str(files[0])))
        assert not files[0].exists()
    return {"trap": trap}


def check_a_new_file_needs_the_right_list_and_no_old_conditioning() -> dict[str, Any]:
    """What prompts are looked up in is read again, and what they were encoded to before is forgotten."""
    shell, name, this = WebuiShell(), "checkfile", webuis.this()
    file = Path(shell.embeddings_folder()) / f"{name}.safetensors"
    with session() as one:
        vectors = [one.token_vectors(text) for text in ("red circle", "blue square")]
    nothing: Callable = lambda: None  # noqa: E731
    try:
        writing.save(Embedding(name, vectors[0], {}), file)
        shell.saved(request(), file, None, "")
        first = picture(name)
        file.unlink()
        writing.save(Embedding(name, vectors[1], {}), file)
        with changed(webui_shell, "forget_conditionings", nothing):
            shell.saved(request(), file, None, "")
        assert torch.equal(picture(name), first), "nothing to forget"
        shell.saved(request(), file, None, "")
        second = picture(name)
        assert not torch.equal(second, first)
        file.unlink()
        writing.save(Embedding(name, vectors[0], {}), file)
        with changed(family(), "refresh_embeddings", nothing):
            shell.saved(request(), file, None, "")
        unread = torch.equal(picture(name), second)
        assert unread or this.rereads
    finally:
        for each in file.parent.glob(f"{name}.*"):
            each.unlink()
        family().refresh_embeddings()
        webui_shell.forget_conditionings()
    return {"trap": ["conditioning", *(["list"] if unread else [])]}


# ---- what a person reads ------------------------------------------------------------------------------------------


def check_the_next_picture_names_nothing_of_ours() -> dict[str, Any]:
    """A text engine of Forge's remembers the embeddings in whatever it has encoded, and the next picture names them."""
    from modules import prompt_parser, shared

    outcome(request())
    info = generation("a red circle after a run").info
    assert PLACEHOLDER not in info, info
    assert "TI: " not in info, info
    trap = webuis.this().remembers_names
    if trap:
        engines = family().loaded().engines
        with session() as one:
            vec = one.token_vectors("red")
        named = SimpleNamespace(name="checkleft", vec=vec, vectors=len(next(iter(vec.values()))), shorthash=None)
        for engine in engines.values():
            engine.register(named, named.name)
        text = prompt_parser.SdConditioning([named.name], width=64, height=64)
        shared.sd_model.get_learned_conditioning(text)
        for engine in engines.values():
            engine.register(None, named.name)
        assert named.name in generation("a red circle after another").info
    return {"trap": trap}


def check_a_refused_run_says_why_whatever_failed_before() -> dict[str, Any]:
    """Forge shows the last error of its main thread in place of a new one."""
    import gradio as gr

    shell = WebuiShell()
    with gr.Blocks(analytics_enabled=False):
        tab = Tab(shell)
        tab.lay_out()
    values = {name: field.value for name, field in tab.fields.items()} | {"prompt": "", "name": "checkrefused"}
    why, empty = raised(EstimateError, request(prompt="").validate), [None] * (len(tab.outputs) - 1)

    def fail(*_: Any) -> None:
        raise EstimateError("of this run")

    with webuis.this().after_another_error() as trap:
        shown = shell.wrap(lambda _, *given: [*tab._run(given)][-1], empty)("task(check)", *values.values())
        assert any(html.escape(in_the_tab(why)) in str(each) for each in shown), shown
        if trap:
            assert "of another job" in shell.wrap(fail, empty)("task(check)")[-1]
    return {"trap": trap}
