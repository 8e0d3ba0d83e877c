"""Checkpoints with zero terminal SNR: SDXL that predicts v, at whose last noise level nothing but noise is left."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import load_file, save_file

from lib_estimate.errors import ModelError
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import StepConditioning
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import EstimateRequest, ModelOptions, Part, Use
from tests.conftest import record, run
from tests.small_models import SIDE, small_model

STEPS = 5


def marked(path, *keys: str):
    """A checkpoint with keys that say what it is, as such files have them."""
    save_file(load_file(path) | {key: torch.zeros(1) for key in keys}, path)
    return StandaloneHost(ModelOptions(model=str(path), device="cpu"))


@pytest.fixture(scope="module")
def small():
    return small_model("sdxl", "v_prediction")


@pytest.fixture(scope="module")
def pipeline(small):
    made = small.pipeline()
    made.scheduler = DDIMScheduler.from_config(
        made.scheduler.config, rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    return made


@pytest.fixture(scope="module")
def zero(small, tmp_path_factory) -> StandaloneHost:
    return marked(small.single_file(tmp_path_factory.mktemp("zero") / "one.safetensors"), "v_pred", "ztsnr")


def test_the_noise_schedule_is_the_webuis(zero) -> None:
    """AUTOMATIC1111's rescale_zero_terminal_snr_abar, which leaves 4.9e-8 in the last place."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wanted = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    assert torch.allclose(zero.parts.alphas_cumprod[:-1], wanted[:-1], rtol=1e-6)
    assert zero.parts.alphas_cumprod[-1] == pytest.approx(4.8973451890853435e-08)


def test_a_generation_is_diffusers_own(zero, pipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path / "folder")
    folder = StandaloneHost(ModelOptions(model=str(tmp_path / "folder"), device="cpu"))
    noise = torch.randn(1, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    side = 8 * SIDE
    wanted = pipeline(
        "a red circle", num_inference_steps=STEPS, guidance_scale=5.0, latents=noise, output_type="latent",
        height=side, width=side,
    ).images  # fmt: skip
    for host in (zero, folder):
        with host.session() as session, torch.no_grad():
            given = StepConditioning(((1.0, session.encode(["a red circle"])),), session.encode([""], negative=True))
            *_, path = session.sample(noise, [given] * STEPS, 5.0)
        assert path.timestep[0] == 999
        assert torch.allclose(path.final, wanted, atol=2e-3 * wanted.abs().max().item())


@pytest.mark.parametrize("at", [0, 2, STEPS - 1])
def test_an_error_moves_the_finished_latents_as_it_is_weighted(zero, at) -> None:
    """By dsigma, where nothing later answers to it: later steps say the same eps whatever the latents are."""
    abar = zero.parts.alphas_cumprod
    levels = denoising.Levels(abar.double(), velocity=True)
    levels.abar = abar.double()
    answers = torch.randn(STEPS, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = levels.timesteps(STEPS, 0)
    afters = [*timesteps[1:], 0]

    def final(error: float) -> torch.Tensor:
        x = torch.ones(4, 4, dtype=torch.float64)
        for step, (t, after) in enumerate(zip(timesteps, afters, strict=True)):
            a = abar[t].double()
            v = (answers[step] - (1 - a).sqrt() * x) / a.sqrt() if step > at else answers[step]
            x = levels.step(x, v + (error if step == at else 0), t, after)
        return x / abar[0].sqrt()

    moved = (final(0.5) - final(0.0)).abs() / 0.5
    assert torch.allclose(moved, levels.moves(timesteps[at], afters[at]).expand_as(moved), rtol=1e-6)


def test_every_recording_begins_where_nothing_but_noise_is(zero) -> None:
    levels = denoising.Levels(zero.parts.alphas_cumprod, velocity=True)
    assert levels.timesteps(5, -0.25) == [999, 649, 449, 249, 49]
    assert levels.timesteps(5, -0.75) == [999, 749, 549, 349, 149]


@pytest.fixture(scope="module")
def request_of(tmp_path_factory) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (red:1.6) circle", name="zero", part=Part.UNET, use=Use.WHOLE, steps=5, sampling_steps=4,
        trajectories=1, images=0,
        out=str(tmp_path_factory.mktemp("out")),
    )  # fmt: skip


def test_the_text_counts_at_the_last_level(zero, request_of) -> None:
    """What differs between the prompt with and without its weights there is as large as at the other levels."""
    with zero.session() as session:
        bank = record(session, request_of).bank
    differs = (bank.target - bank.empty).square().flatten(1).mean(1)
    assert bank.timestep[0] == 999
    assert differs[0] > 0.1 * differs.mean()
    assert bank.weight.isfinite().all()
    assert bank.weight[0] == pytest.approx(1, rel=1e-2)  # where all of the latent comes from what is said


def test_vectors_learn(zero, request_of) -> None:
    outcome = run(request_of, zero)
    assert min(outcome.losses) < 0.9 * outcome.losses[0]
    assert 0 < outcome.fidelity.error < outcome.fidelity.unweighted_error
    assert all(rows.isfinite().all() for rows in outcome.embedding.vectors.values())


def test_without_v_it_is_refused(small, tmp_path) -> None:
    path = small.single_file(tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="marked for zero terminal SNR but not for v-prediction"):
        marked(path, "ztsnr")
