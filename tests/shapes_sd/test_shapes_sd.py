"""The small trained model itself: one file both kinds of host read, and words that mean something."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open

from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import ModelOptions
from tests.conftest import SHAPES_SD
from tests.shapes_sd import check, export, pictures, train

FOLDER = SHAPES_SD.parent
LIMIT = 24 * 2**20  # bytes, with the vocabulary


def test_it_is_small_and_half_precision() -> None:
    files = [SHAPES_SD, *(FOLDER / "tokenizer").iterdir()]
    assert sum(path.stat().st_size for path in files) <= LIMIT
    with safe_open(SHAPES_SD, framework="pt") as file:
        kinds = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a dict)
        prefixes = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118
    assert kinds == {"F16"}
    assert prefixes == {"model", "first_stage_model", "cond_stage_model"}


def test_its_layout_names_this_model() -> None:
    params = yaml.safe_load(SHAPES_SD.with_suffix(".yaml").read_text())["model"]["params"]
    assert params["unet_config"]["params"]["use_spatial_transformer"]
    assert (FOLDER / params["cond_stage_config"]["params"]["version"] / "vocab.json").exists()


def test_states_have_the_mean_that_original_emphasis_divides_by(session) -> None:
    mean = session.encode(["a red circle"]).hidden.mean().item()
    assert -0.15 < mean < -0.05


def test_the_committed_count_reaches_its_bounds() -> None:
    count = json.loads((FOLDER / "COUNT.json").read_text())
    single, pair = count["single"], count["pair"]
    assert single["pictures"] >= 60
    assert pair["pictures"] >= 60
    assert single["all"] >= 0.9 * single["pictures"]
    assert pair["all"] >= 0.5 * pair["pictures"]


def test_it_draws_what_the_prompt_says(host) -> None:
    """The committed count holds for the committed weights: a part of the same sheet."""
    result = check.count(host, check.single_prompts(10, random.Random(check.SEED)))
    assert result["all"] >= 9, result


def test_the_judge_can_tell_right_from_wrong() -> None:
    rng = random.Random(3)
    rows = check.single_prompts(40, rng)
    for (_, [(colour, shape)], background), (_, others, elsewhere) in pairwise(rows):
        scene = pictures.Scene((pictures.Thing(colour, shape, "large", 0.5, 0.5, 0.28),), background, None, None)
        picture = pictures.draw(scene, rng)
        verdict = check.right(picture, [(colour, shape)], background)
        assert all(verdict.values()), (colour, shape, background, verdict)
        if others != [(colour, shape)]:
            assert not check.right(picture, others, elsewhere)["things"]


def test_pictures_repeat_from_a_seed() -> None:
    def first(seed: int) -> tuple:
        rng = random.Random(seed)
        scene = pictures.random_scene(rng)
        return scene, pictures.caption(scene, rng), pictures.draw(scene, rng).tobytes()

    assert first(5) == first(5)
    assert first(5) != first(6)


def test_unused_rows_look_like_used_ones(session) -> None:
    table = session.parts.text_encoders[0].table.weight.float()
    used = table[session.token_ids("red circle blue square background")]
    unused = table[10_000:10_500]
    assert unused.norm(dim=1).mean().item() == pytest.approx(used.norm(dim=1).mean().item(), rel=0.5)


def test_rescaling_the_vae_changes_the_latents_alone() -> None:
    weights = {
        "quant_conv.weight": torch.randn(8, 8, 1, 1), "quant_conv.bias": torch.randn(8),
        "post_quant_conv.weight": torch.randn(4, 4, 1, 1), "post_quant_conv.bias": torch.randn(4),
    }  # fmt: skip
    scaled = export.rescaled(weights, 2.0)
    moments = torch.randn(8)
    before = weights["quant_conv.weight"][..., 0, 0] @ moments + weights["quant_conv.bias"]
    after = scaled["quant_conv.weight"][..., 0, 0] @ moments + scaled["quant_conv.bias"]
    assert torch.allclose(after[:4], 2 * before[:4])
    assert torch.allclose(torch.exp(after[4:] / 2), 2 * torch.exp(before[4:] / 2), rtol=1e-4)
    decoded = [w["post_quant_conv.weight"][..., 0, 0] @ z for w, z in ((weights, before[:4]), (scaled, after[:4]))]
    assert torch.allclose(decoded[0], decoded[1], atol=1e-5)


def test_the_vocabulary_says_whose_it_is() -> None:
    assert "MIT" in (Path(FOLDER) / "tokenizer" / "LICENSE").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Networks as the training script makes them, and the host that read their export."""
    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**train.UNET_CONFIG), AutoencoderKL(**train.VAE_CONFIG)
    text = train.new_text_encoder(50)
    used = torch.randperm(export.ROWS, generator=torch.Generator().manual_seed(0))[:50].sort().values
    weights = export.whole(unet.state_dict(), vae.state_dict(), text.state_dict(), used, scale=export.LDM_SCALE)
    folder = tmp_path_factory.mktemp("trained")
    export.save(weights, folder / "trained.safetensors")
    (folder / "trained.yaml").write_text(SHAPES_SD.with_suffix(".yaml").read_text())
    (folder / "tokenizer").symlink_to(FOLDER / "tokenizer")
    host = StandaloneHost(ModelOptions(model=str(folder / "trained.safetensors"), device="cpu"))
    return unet, vae, text, used, host


def test_the_exported_file_gives_the_training_models_noise(trained) -> None:
    unet, _, _, _, host = trained
    x, t, z = torch.randn(2, 4, 16, 16), torch.tensor([20, 900]), torch.randn(2, 77, train.WIDTH)
    with torch.no_grad():
        wanted, got = (model(x, t, z).sample for model in (unet.eval(), host.parts.unet))
    assert (wanted - got).abs().max() < 1e-3 * wanted.abs().max().clamp_min(1)


def test_the_exported_file_gives_the_training_models_pictures_and_states(trained) -> None:
    _, vae, text, used, host = trained
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        latents = [model.encode(pixels).latent_dist.mean for model in (vae.eval(), host.parts.vae)]
        assert torch.allclose(*latents, atol=1e-2)
        decoded = [model.decode(latents[0]).sample for model in (vae, host.parts.vae)]
        assert torch.allclose(*decoded, atol=2e-2)
        rows = torch.randint(0, 50, (2, 77), generator=torch.Generator().manual_seed(1))
        states = [text.eval()(rows).last_hidden_state, host.parts.text_encoders[0].model(used[rows]).last_hidden_state]
    assert torch.allclose(*states, atol=2e-2)
