"""Reads Stable Diffusion 1 checkpoints for the standalone host: diffusers folders and single LDM-layout files.

Leans on diffusers' `from_single_file` (read in 0.42) and transformers' CLIP classes (4.30 to 5). Nothing is downloaded:
what a file doesn't hold (vocabulary, layout) comes from its neighbours or from this project's checkout.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_estimate.errors import ModelError

log = logging.getLogger(__name__)

BUNDLED_VOCABULARY = Path(__file__).parents[2] / "tests" / "shapes_sd" / "tokenizer"
LDM_TEXT = "cond_stage_model.transformer."
LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
# The layout of Stable Diffusion 1 itself, for a single file that has no .yaml beside it.
SD1_LAYOUT: dict[str, Any] = {
    "linear_start": 0.00085,
    "linear_end": 0.0120,
    "timesteps": 1000,
    "image_size": 64,
    "scale_factor": 0.18215,
    "unet_config": {
        "params": {
            "in_channels": 4, "out_channels": 4, "model_channels": 320, "attention_resolutions": [4, 2, 1],
            "num_res_blocks": 2, "channel_mult": [1, 2, 4, 4], "num_heads": 8, "transformer_depth": 1,
            "context_dim": 768, "use_spatial_transformer": True,
        }
    },
    "first_stage_config": {
        "params": {
            "ddconfig": {
                "in_channels": 3, "out_ch": 3, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2,
                "z_channels": 4, "resolution": 256,
            }
        }
    },
}  # fmt: skip


@dataclass
class Components:
    """The networks of one checkpoint and what is needed to run them."""

    name: str
    hash: str | None
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    alphas_cumprod: Tensor  # [timesteps], float64
    prediction: str  # "epsilon" or "v_prediction"
    default_size: int  # pixels


def load(path: Path, dtype: torch.dtype) -> Components:
    """Loads a checkpoint; ModelError says what is wrong with it or why it can't be used."""
    if not path.exists():
        raise ModelError(f"There is no model at {path}. Give a diffusers folder or a .safetensors / .ckpt file.")
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # it warns of number formats that are as they should be
    try:
        return _load_folder(path, dtype) if path.is_dir() else _load_single(path, dtype)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(f"The model at {path} could not be loaded: {error}") from error
    finally:
        diffusers_logging.set_verbosity(verbosity)


# ---- diffusers folder ---------------------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype) -> Components:
    index = folder / "model_index.json"
    if not index.exists():
        raise ModelError(
            f"{folder} has no model_index.json: it is not a diffusers folder. Give the folder that holds it."
        )
    if (folder / "text_encoder_2").exists() or "text_encoder" not in json.loads(index.read_text(encoding="utf-8")):
        raise ModelError(f"{folder} is not of the Stable Diffusion 1 family; only that family works so far.")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, local_files_only=True)
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(dtype)
    side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else max(unet.config.sample_size)
    return _checked(
        Components(
            name=folder.name,
            hash=None,
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            text_encoder=text_encoder,
            unet=unet,
            vae=vae,
            alphas_cumprod=_alphas_cumprod(
                scheduler.get("beta_schedule", "linear"),
                scheduler.get("beta_start", 0.0001),
                scheduler.get("beta_end", 0.02),
                scheduler.get("num_train_timesteps", 1000),
            ),
            prediction=scheduler.get("prediction_type", "epsilon"),
            default_size=side * 2 ** (len(vae.config.block_out_channels) - 1),
        )
    )


# ---- single file --------------------------------------------------------------------------------------------------


def _load_single(path: Path, dtype: torch.dtype) -> Components:
    weights = _read_weights(path)
    layout = _layout(path)
    original = {"model": {"params": layout}}
    unet = UNet2DConditionModel.from_single_file(
        _part(weights, LDM_UNET, path), original_config=original, torch_dtype=dtype, local_files_only=True
    )
    vae = AutoencoderKL.from_single_file(
        _part(weights, LDM_VAE, path), original_config=original, torch_dtype=dtype, local_files_only=True
    )
    unet.register_to_config(sample_size=layout["image_size"])  # diffusers writes Stable Diffusion's own
    folder = _text_folder(path, layout)
    return _checked(
        Components(
            name=path.stem,
            hash=_short_hash(path),
            tokenizer=CLIPTokenizer.from_pretrained(folder, local_files_only=True),
            text_encoder=_text_encoder(_part(weights, LDM_TEXT, path), folder).to(dtype),
            unet=unet,
            vae=vae,
            alphas_cumprod=_alphas_cumprod(
                "scaled_linear", layout["linear_start"], layout["linear_end"], layout.get("timesteps", 1000)
            ),
            prediction="v_prediction" if layout.get("parameterization") == "v" else "epsilon",
            default_size=layout["image_size"] * 2 ** (len(vae.config.block_out_channels) - 1),
        )
    )


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint. A .ckpt is read weights-only: no code in it runs."""
    try:
        if path.suffix.lower() == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            weights = weights.get("state_dict", weights)
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole .safetensors file ({error}). Copy or download it again.") from error
    except Exception as error:  # the unpickler raises whatever a broken file makes it raise
        raise ModelError(
            f"{path} could not be read as a checkpoint ({type(error).__name__}). A .ckpt may hold weights only: "
            "convert one that holds code to .safetensors."
        ) from error
    if any(key.startswith("conditioner.embedders.1") for key in weights):
        raise ModelError(f"{path} is an SDXL checkpoint; only the Stable Diffusion 1 family works so far.")
    if any(key.startswith("cond_stage_model.model.") for key in weights):
        raise ModelError(f"{path} is a Stable Diffusion 2 checkpoint; only the Stable Diffusion 1 family works so far.")
    return weights


def _part(weights: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    part = {key: value for key, value in weights.items() if key.startswith(prefix)}
    if not part:
        raise ModelError(
            f"{path} has no {prefix}* weights: it is not a whole Stable Diffusion 1 checkpoint (a LoRA, a VAE?). "
            "Give the checkpoint itself."
        )
    return part


def _layout(path: Path) -> dict[str, Any]:
    """`model.params` of the .yaml beside the file (the webui's convention), or Stable Diffusion 1's own."""
    config = path.with_suffix(".yaml")
    if not config.exists():
        return SD1_LAYOUT
    try:
        params = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["params"]
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ModelError(f"{config} is not a Stable Diffusion layout: it has no model.params.") from error
    return {**{key: SD1_LAYOUT[key] for key in ("linear_start", "linear_end", "image_size")}, **params}


def _text_folder(path: Path, layout: dict[str, Any]) -> Path:
    """The folder with the vocabulary (and perhaps the text encoder's config.json) of a single file."""
    named = ((layout.get("cond_stage_config") or {}).get("params") or {}).get("version")
    candidates = [path.parent / named] if named else []
    candidates += [path.with_suffix(""), path.parent / "tokenizer", path.parent, BUNDLED_VOCABULARY]
    for folder in candidates:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return folder
    raise ModelError(
        f"No CLIP vocabulary found for {path}: put vocab.json and merges.txt into {path.parent / 'tokenizer'}."
    )


def _text_encoder(weights: dict[str, Tensor], folder: Path) -> CLIPTextModel:
    """A CLIP text model with an LDM checkpoint's weights; its layout is read off them."""
    plain = {key.removeprefix(LDM_TEXT).removeprefix("text_model."): value for key, value in weights.items()}
    plain.pop("embeddings.position_ids", None)
    rows, width = plain["embeddings.token_embedding.weight"].shape
    layers = 1 + max(int(key.split(".")[2]) for key in plain if key.startswith("encoder.layers."))
    known = _text_config(folder, width)
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=plain["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=known.get("num_attention_heads") or _clip_heads(folder, width),
        max_position_embeddings=plain["embeddings.position_embedding.weight"].shape[0],
        hidden_act=known.get("hidden_act", "quick_gelu"),
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = CLIPTextModel(config)
    prefix = "text_model." if hasattr(model, "text_model") else ""
    missing, _ = model.load_state_dict({prefix + key: value.float() for key, value in plain.items()}, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing:
        raise ModelError(
            f"The text encoder's weights are not complete: {missing[0]} and {len(missing) - 1} more are missing."
        )
    return model


def _text_config(folder: Path, width: int) -> dict[str, Any]:
    """The text part of a config.json beside the vocabulary, if it is of an encoder of this width."""
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    values = values.get("text_config", values)
    return values if values.get("hidden_size") == width else {}


def _clip_heads(folder: Path, width: int) -> int:
    """The number of attention heads can't be read off weights; every real CLIP has 64 channels a head."""
    if width % 64:
        raise ModelError(f"The text encoder is {width} wide, which is no CLIP's: put its config.json into {folder}.")
    return width // 64


def _alphas_cumprod(schedule: str, start: float, end: float, timesteps: int) -> Tensor:
    """prod(1 - beta), `[timesteps]`; Ho et al. 2020, with Stable Diffusion's scaled_linear betas."""
    if schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(start, end, timesteps, dtype=torch.float64)
    else:
        raise ModelError(f"The model's noise schedule is {schedule!r}; only scaled_linear and linear are known.")
    return torch.cumprod(1 - betas, 0)


def _short_hash(path: Path) -> str:
    """The first ten hex digits of the file's SHA-256, as the webui shows them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:10]


def _checked(parts: Components) -> Components:
    """Refuses what would run but mean something else."""
    if parts.unet.config.in_channels != parts.vae.config.latent_channels:
        raise ModelError(
            f"{parts.name} is an inpainting or instruct checkpoint, which does not work yet: take its base model."
        )
    if parts.prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"{parts.name} predicts {parts.prediction!r}; only epsilon and v_prediction are known.")
    width = parts.text_encoder.config.hidden_size
    if parts.unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{parts.name}: the text encoder gives {width} channels, "
            f"the U-Net takes {parts.unet.config.cross_attention_dim}."
        )
    return parts
