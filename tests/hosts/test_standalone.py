"""The host without a webui: loading, encoding and noise prediction, against the libraries themselves."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from lib_estimate.errors import ModelError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts import denoising
from lib_estimate.hosts.base import StepConditioning
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import Emphasis, ModelOptions
from tests.conftest import SHAPES_SD


@pytest.fixture(scope="module")
def folder(host, tmp_path_factory):
    """The small model as a diffusers folder, written by diffusers."""
    path = tmp_path_factory.mktemp("model") / "shapes"
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    parts = host.parts
    StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoders[0].model, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    return path


def states(host: StandaloneHost, *texts: str, **options) -> torch.Tensor:
    with host.session() as session, torch.no_grad():
        return session.encode(texts, **options).hidden


def with_options(host: StandaloneHost, **options) -> StandaloneHost:
    """The same loaded model under other options."""
    other = StandaloneHost.__new__(StandaloneHost)
    other.__dict__ |= host.__dict__ | {"options": ModelOptions(model=str(SHAPES_SD), **options)}
    return other


def test_a_diffusers_folder_is_the_same_model(host, folder) -> None:
    other = StandaloneHost(ModelOptions(model=str(folder), device="cpu"))
    assert torch.allclose(states(host, "a (red:1.3) circle"), states(other, "a (red:1.3) circle"), atol=1e-5)
    assert torch.allclose(host.parts.alphas_cumprod, other.parts.alphas_cumprod)
    assert other.parts.default_size == host.parts.default_size


def test_states_are_the_text_models_own(host) -> None:
    ids = host.parts.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(states(host, "a red circle"), host.parts.text_encoders[0].model(ids).last_hidden_state)


def test_clip_skip_reads_an_earlier_layer(host) -> None:
    ids = host.parts.tokenizer("a red circle", padding="max_length", return_tensors="pt").input_ids
    model: CLIPTextModel = host.parts.text_encoders[0].model
    with torch.no_grad():
        layers = model(ids, output_hidden_states=True).hidden_states
        norm = getattr(model, "text_model", model).final_layer_norm
        assert torch.allclose(states(with_options(host, clip_skip=2), "a red circle"), norm(layers[-2]), atol=1e-6)


def test_clip_skip_beyond_the_models_layers_is_said(host) -> None:
    with pytest.raises(ModelError, match="has 3 layers"):
        states(with_options(host, clip_skip=4), "a red circle")


def test_emphasis_modes(host) -> None:
    plain = states(host, "a red circle")
    weighted = {mode: states(with_options(host, emphasis=mode), "a (red:1.5) circle") for mode in Emphasis}
    scaled = plain.clone()
    scaled[:, 2] *= 1.5
    assert torch.allclose(weighted[Emphasis.NO_NORM], scaled, atol=1e-5)
    assert torch.allclose(weighted[Emphasis.ORIGINAL], scaled * plain.mean() / scaled.mean(), atol=1e-5)
    assert torch.equal(weighted[Emphasis.IGNORE], plain)
    assert not torch.allclose(weighted[Emphasis.NONE], plain, atol=1e-2)
    assert torch.equal(states(host, "a (red:1.5) circle", weighted=False), plain)


def test_texts_encoded_side_by_side_do_not_change_each_other(host) -> None:
    both = states(host, "a (red:1.5) circle", "(blue:0.3) star")
    assert torch.allclose(both[:1], states(host, "a (red:1.5) circle"), atol=1e-5)
    together = states(host, "a (red:1.5) circle", "(blue:0.3) star", together=True)
    assert not torch.allclose(together[:1], both[:1], atol=1e-4)


def test_vectors_stand_where_the_placeholder_does(host) -> None:
    with host.session() as session, torch.no_grad():
        rows = {"clip_l": session.token_vectors("large red")["clip_l"]}
        encoded = session.encode([f"a {session.placeholder} circle"], rows).hidden
        assert torch.allclose(encoded, session.encode(["a large red circle"]).hidden, atol=1e-5)
        weighted = session.encode([f"a ({session.placeholder}:1.3) circle"], rows).hidden
        assert torch.allclose(weighted, session.encode(["a (large red:1.3) circle"]).hidden, atol=1e-5)


def test_a_saved_embedding_is_used_by_name(host, tmp_path) -> None:
    with host.session() as session:
        rows = session.token_vectors("large red")
    writing.save(Embedding("bigred", rows, {}), tmp_path / "bigred.pt")
    wrong = Embedding("wrong", {"clip_l": torch.zeros(1, 3)}, {})
    writing.save(wrong, tmp_path / "wrong.pt")
    (tmp_path / "broken.pt").write_bytes(b"broken")
    other = with_options(host)
    other.embeddings = tmp_path
    assert torch.allclose(states(other, "a bigred circle"), states(host, "a large red circle"), atol=1e-5)


@pytest.mark.parametrize("mode", list(Emphasis))
def test_a_weight_on_a_saved_embedding_is_as_on_the_words_it_stands_for(host, tmp_path, mode) -> None:
    with host.session() as session:
        rows = session.token_vectors("large red")
    writing.save(Embedding("bigred", rows, {}), tmp_path / "bigred.pt")
    other = with_options(host, emphasis=mode)
    other.embeddings = tmp_path
    weighted = states(other, "a (bigred:1.4) circle")
    assert torch.allclose(weighted, states(with_options(host, emphasis=mode), "a (large red:1.4) circle"), atol=1e-5)
    does_something = mode in (Emphasis.ORIGINAL, Emphasis.NO_NORM)
    if mode is not Emphasis.NONE:  # which reads the brackets as text
        assert torch.allclose(weighted, states(other, "a bigred circle"), atol=1e-5) is not does_something


def test_a_trajectory_is_what_ddim_does(host) -> None:
    """The same as diffusers' own pipeline from the same noise."""
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parts = host.parts
    pipeline = StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoders[0].model, tokenizer=parts.tokenizer, unet=parts.unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    with host.session() as session:
        info = session.info
        side = info.default_size // info.latent_scale
        noise = torch.randn(1, info.latent_channels, side, side, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            step = StepConditioning(((1.0, session.encode(["a red circle"])),), session.encode([""]))
        *counts, path = session.sample(noise, [step] * 8, 5.0)
        wanted = pipeline(
            "a red circle", num_inference_steps=8, guidance_scale=5.0, latents=noise, output_type="latent",
            height=info.default_size, width=info.default_size,
        ).images  # fmt: skip
        assert counts == list(range(1, 9))
        assert torch.allclose(path.final, wanted, atol=1e-3)
        assert torch.equal(path.x[0], noise)
        picture = session.decode(path.final)
        assert picture.shape == (1, 3, info.default_size, info.default_size)
        assert 0 <= picture.min() < picture.max() <= 1


def test_offset_moves_the_timesteps_between_the_others(host) -> None:
    with host.session() as session, torch.no_grad():
        step = StepConditioning(((1.0, session.encode(["a"])),), session.encode([""]))
        noise = torch.zeros(1, session.info.latent_channels, 8, 8)
        *_, plain = session.sample(noise, [step] * 4, 1.0)
        *_, moved = session.sample(noise, [step] * 4, 1.0, offset=0.5)
    assert (plain.timestep - moved.timestep).tolist() == [125, 125, 125, 1]


def test_at_cfg_scale_one_the_negative_prompt_is_not_run(host) -> None:
    with host.session() as session, torch.no_grad():
        red, star = session.encode(["a red circle"]), session.encode(["a star"])
        noise = torch.randn(2, session.info.latent_channels, 8, 8, generator=torch.Generator().manual_seed(2))

        def forwards(*parts, cfg_scale: float = 1.0):
            before = session.forwards
            *_, path = session.sample(noise, [StepConditioning(parts, star)] * 4, cfg_scale)
            return path, session.forwards - before

        plain, cost = forwards((1.0, red))
        almost, usual = forwards((1.0, red), cfg_scale=1.00001)
        assert (cost, usual) == (4 * 2, 2 * 4 * 2)
        assert plain.negative is None
        assert torch.allclose(plain.final, almost.final, atol=1e-3)
        # What AND composes, it composes over the negative prompt.
        both, cost = forwards((1.0, red), (0.5, star))
        assert cost == 3 * 4 * 2
        assert torch.allclose(both.final, plain.final, atol=1e-3)


def test_v_prediction_becomes_noise(host, monkeypatch) -> None:
    """A v-prediction checkpoint whose network says v gives the eps of the same picture."""
    with host.session() as session, torch.no_grad():
        x0, eps = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        t = torch.tensor([100, 800])
        a = session.parts.alphas_cumprod[t].float()[:, None, None, None]
        x, v = a.sqrt() * x0 + (1 - a).sqrt() * eps, a.sqrt() * eps - (1 - a).sqrt() * x0
        monkeypatch.setattr(session, "levels", denoising.Levels(session.parts.alphas_cumprod, velocity=True))
        monkeypatch.setattr(session.parts, "unet", FakeUnet(v))
        assert torch.allclose(session.predict_noise(x, t, session.encode([""])), eps, atol=1e-4)


class FakeUnet:
    def __init__(self, answer: torch.Tensor) -> None:
        self.answer = answer

    def __call__(self, *args, **kwargs):
        return (self.answer,)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_reads_the_prompt_alike(host, dtype, request) -> None:
    if dtype == "float16":
        request.getfixturevalue("float16_on_cpu")
    half = StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu", dtype=dtype))
    assert half.parts.unet.dtype == getattr(torch, dtype)
    assert torch.allclose(states(half, "a (red:1.3) circle"), states(host, "a (red:1.3) circle"), atol=0.15)


def test_a_ckpt_is_read_weights_only(host, tmp_path) -> None:
    torch.save({"state_dict": load_file(SHAPES_SD)}, tmp_path / "shapes.ckpt")
    (tmp_path / "shapes.yaml").write_text(
        (SHAPES_SD.with_suffix(".yaml")).read_text().replace("version: tokenizer", "")
    )
    (tmp_path / "tokenizer").symlink_to(SHAPES_SD.parent / "tokenizer")
    other = StandaloneHost(ModelOptions(model=str(tmp_path / "shapes.ckpt"), device="cpu"))
    assert torch.allclose(states(host, "a red circle"), states(other, "a red circle"), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if not k.startswith("model.diffusion")}, "LoRA"),
        (lambda w: w | {"conditioner.embedders.0.model.x": torch.zeros(1)}, "refiner"),
        (lambda w: w | {"ztsnr": torch.zeros(1)}, "zero terminal SNR"),
        (lambda w: {k: v for k, v in w.items() if "encoder.layers.1.mlp.fc1" not in k}, "not complete"),
    ],
)
def test_what_cannot_work_is_refused(change, words, tmp_path) -> None:
    save_file(change(load_file(SHAPES_SD)), tmp_path / "other.safetensors")
    (tmp_path / "other.yaml").write_text(SHAPES_SD.with_suffix(".yaml").read_text())
    (tmp_path / "tokenizer").symlink_to(SHAPES_SD.parent / "tokenizer")
    with pytest.raises(ModelError, match=words):
        StandaloneHost(ModelOptions(model=str(tmp_path / "other.safetensors")))


def test_a_folder_of_another_family_is_refused(folder, tmp_path) -> None:
    with pytest.raises(ModelError, match=r"model_index\.json"):
        StandaloneHost(ModelOptions(model=str(tmp_path)))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(ModelError, match="family"):
        StandaloneHost(ModelOptions(model=str(tmp_path)))
    (tmp_path / "text_encoder_2").mkdir()
    with pytest.raises(ModelError, match="refiner"):
        StandaloneHost(ModelOptions(model=str(tmp_path)))


def test_lora_tags_are_said_to_do_nothing(session) -> None:
    assert "<lora:x:1>" in session.notes("a <lora:x:1> cat")[0]
    assert session.read("a <lora:x:1> cat", 5)[0].texts == ((5, "a  cat"),)
