"""A model that goes beyond float16's largest number somewhere, 65,504, as real ones do: what goes beyond it calculates
in bfloat16, and the weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib_estimate.errors import ModelError
from lib_estimate.hosts.base import Network
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.progress import Note
from lib_estimate.request import EstimateRequest, ModelOptions, Part, Use
from lib_estimate.target.recording import TOO_LARGE
from lib_estimate.words import estimate
from tests.conftest import SHAPES_SD, all_parameters, run

BEYOND = 2.0**16  # exact in both formats; what is larger than one becomes too large for float16


@pytest.fixture(scope="module")
def half(float16_on_cpu) -> StandaloneHost:
    return StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu", dtype="float16"))


@pytest.fixture
def brief(tmp_path) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (red:1.6) circle", name="large", part=Part.UNET, use=Use.WHOLE, steps=1, trajectories=1,
        sampling_steps=2, images=1, width=64, height=64, out=str(tmp_path),
    )  # fmt: skip


@contextmanager
def scaled(first: nn.Module, second: nn.Module) -> Iterator[None]:
    """The same function with large numbers between two layers."""
    own = [(p, p.detach().clone()) for p in (*first.parameters(), second.weight)]
    try:
        with torch.no_grad():
            for parameter in first.parameters():
                parameter *= BEYOND
            second.weight /= BEYOND
        yield
    finally:
        for parameter, before in own:
            parameter.data = before


def unet_layers(host: StandaloneHost) -> tuple[nn.Module, nn.Module]:
    attention = host.parts.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    return attention.to_v, attention.to_out[0]


def text_layers(host: StandaloneHost) -> tuple[nn.Module, nn.Module]:
    body = host.parts.text_encoders[0].model
    layer = getattr(body, "text_model", body).encoder.layers[0].self_attn
    return layer.v_proj, layer.out_proj


def vae_layers(host: StandaloneHost) -> tuple[nn.Module, nn.Module]:
    attention = host.parts.vae.decoder.mid_block.attentions[0]
    return attention.to_v, attention.to_out[0]


LAYERS = {Network.UNET: unet_layers, Network.TEXT: text_layers, Network.VAE: vae_layers}


def test_what_is_too_large_for_float16_is_calculated_in_bfloat16(half, host, brief) -> None:
    """All three networks in one run, and the weights are as before."""
    wanted = run(replace(brief, name="plain"), host)
    before, notes = all_parameters(half), []
    with scaled(*unet_layers(half)), scaled(*text_layers(half)), scaled(*vae_layers(half)):
        planted = all_parameters(half)
        for progress in estimate(brief, half):
            notes += [progress.text] if isinstance(progress, Note) else []
            outcome = progress
        assert all(torch.equal(a, b) for a, b in zip(planted, all_parameters(half), strict=True))
    assert notes.count(TOO_LARGE) == 1
    assert outcome.fidelity.unweighted_error == pytest.approx(wanted.fidelity.unweighted_error, rel=0.2)
    assert outcome.fidelity.error < 1.2 * wanted.fidelity.error
    for name, pictures in wanted.fidelity.pictures.items():
        assert (pictures - outcome.fidelity.pictures[name]).abs().mean() < 0.05, name
    assert all(torch.equal(a, b) for a, b in zip(before, all_parameters(half), strict=True))
    assert not any("forward" in vars(module) for network in half.parts.networks() for module in network.modules())


@pytest.mark.parametrize("network", LAYERS)
def test_without_that_it_would_be_no_number(network, half, brief, monkeypatch) -> None:
    """The planted layers really go beyond float16, each network's by itself."""
    with half.session() as session, scaled(*LAYERS[network](half)), torch.no_grad():
        monkeypatch.setattr(session, "widen", lambda network: False)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        given = session.encode(["a red circle"])
        if network is Network.TEXT:
            found = given.hidden
        elif network is Network.UNET:
            found = session.predict_noise(x, torch.tensor([900]), given)
        else:
            found = session.decode(x)
        assert not found.isfinite().all()


def test_a_model_of_no_numbers_is_refused(host, brief) -> None:
    """Nothing is larger than float32, so that there it is the checkpoint."""
    weight = host.parts.unet.conv_out.weight
    kept = weight.detach().clone()
    try:
        weight.data[0, 0, 0, 0] = torch.nan
        with pytest.raises(ModelError, match="no numbers in float32"):
            run(brief, host)
    finally:
        weight.data = kept


def test_only_float16_is_widened(host, half) -> None:
    with host.session() as session:
        assert not session.widen(Network.UNET)
    with half.session() as session:
        assert session.widen(Network.UNET)
        assert not session.widen(Network.UNET)
