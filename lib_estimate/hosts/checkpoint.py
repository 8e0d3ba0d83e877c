"""Reads Stable Diffusion 1, 2 and XL checkpoints for the standalone host: diffusers folders and single files.

Leans on diffusers' `from_single_file` (read in 0.42) and transformers' CLIP classes (4.30 to 5). Nothing is downloaded:
what a file doesn't hold (vocabulary, layout) comes from its neighbours or from this project's checkout.
"""

from __future__ import annotations

import copy
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
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

from lib_estimate.errors import ModelError
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.text_encoder import TextEncoder
from lib_estimate.prompt import vocabulary
from lib_estimate.prompt.cleaning import as_clip, as_open_clip

log = logging.getLogger(__name__)

LDM_TEXT = "cond_stage_model.transformer."
LDM_UNET = "model.diffusion_model."
LDM_VAE = "first_stage_model."
ALMOST_ZERO = 4.8973451890853435e-08  # what the webuis write for it
XL_FIRST, XL_SECOND = "conditioner.embedders.0.", "conditioner.embedders.1."
LDM_OPEN_CLIP = "cond_stage_model.model."
# transformers' name -> open_clip's, of one layer's pieces
OPEN_CLIP_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass
class Components:
    """The networks of one checkpoint and what is needed to run them."""

    name: str
    hash: str | None
    tokenizer: CLIPTokenizerFast
    text_encoders: tuple[TextEncoder, ...]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    alphas_cumprod: Tensor  # [timesteps], float64
    prediction: str  # "epsilon" or "v_prediction"
    default_size: int  # pixels

    def networks(self) -> tuple[nn.Module, ...]:
        return (*(encoder.model for encoder in self.text_encoders), self.unet, self.vae)


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
    parts = json.loads(index.read_text(encoding="utf-8"))
    has = {name for name in ("text_encoder", "text_encoder_2", "unet", "vae") if (folder / name).is_dir()}
    if "text_encoder_2" in has and "text_encoder" not in has:
        raise ModelError(_REFINER.format(folder))
    if not {"text_encoder", "unet", "vae"} <= has or "text_encoder_3" in parts:
        raise ModelError(f"{folder} is not of the Stable Diffusion 1, 2 or XL family; only these work.")
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, local_files_only=True)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype, local_files_only=True)
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer", local_files_only=True)
    side = unet.config.sample_size if isinstance(unet.config.sample_size, int) else max(unet.config.sample_size)
    return _checked(
        Components(
            name=folder.name,
            hash=None,
            tokenizer=tokenizer,
            text_encoders=_folder_encoders(folder, tokenizer, dtype),
            unet=unet,
            vae=vae,
            alphas_cumprod=_alphas_cumprod(
                scheduler.get("beta_schedule", "linear"),
                scheduler.get("beta_start", 0.0001),
                scheduler.get("beta_end", 0.02),
                scheduler.get("num_train_timesteps", 1000),
                scheduler.get("rescale_betas_zero_snr", False),
            ),
            prediction=scheduler.get("prediction_type", "epsilon"),
            default_size=side * 2 ** (len(vae.config.block_out_channels) - 1),
        )
    )


def _folder_encoders(folder: Path, tokenizer: CLIPTokenizerFast, dtype: torch.dtype) -> tuple[TextEncoder, ...]:
    first = CLIPTextModel.from_pretrained(folder / "text_encoder", local_files_only=True).to(dtype)
    if not (folder / "text_encoder_2").is_dir():
        # diffusers' copies of Stable Diffusion 2 end at the layer that is read.
        is_open_clip = tokenizer.pad_token_id != tokenizer.eos_token_id
        return (_of_sd2(first, tokenizer.pad_token_id, layer=1) if is_open_clip else _of_sd1(first, tokenizer),)
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", local_files_only=True).to(dtype)
    pad = CLIPTokenizerFast.from_pretrained(folder / "tokenizer_2", local_files_only=True).pad_token_id
    return _of_sdxl(first, second, tokenizer, pad)


# ---- which layer is read ------------------------------------------------------------------------------------------


def _of_sd1(model: CLIPTextModel, tokenizer: CLIPTokenizerFast) -> TextEncoder:
    end = tokenizer.eos_token_id
    return TextEncoder("clip_l", model, pad=end, layer=1, normed=True, clip_skip=True, pooled=False, clean=as_clip)


def _of_sd2(model: CLIPTextModel, pad: int, layer: int) -> TextEncoder:
    """A webui's clip skip has no effect on Stable Diffusion 2."""
    return TextEncoder(
        "clip_h", model, pad=pad, layer=layer, normed=True, clip_skip=False, pooled=False, clean=as_open_clip
    )


def _of_sdxl(
    first: CLIPTextModel, second: CLIPTextModelWithProjection, tokenizer: CLIPTokenizerFast, pad: int
) -> tuple[TextEncoder, ...]:
    """The last layer but one of both, without the norm; the pooled vector is the second's."""
    shared: dict[str, Any] = {"layer": 2, "normed": False, "clip_skip": False}
    return (
        TextEncoder("clip_l", first, pad=tokenizer.eos_token_id, pooled=False, clean=as_clip, **shared),
        TextEncoder("clip_g", second, pad=pad, pooled=True, clean=as_open_clip, **shared),
    )


# ---- single file --------------------------------------------------------------------------------------------------


def _load_single(path: Path, dtype: torch.dtype) -> Components:
    weights = _read_weights(path)
    family = _family(weights, path)
    layout = _layout(path, family, weights)
    original = {"model": {"params": layout}}
    unet = UNet2DConditionModel.from_single_file(
        _part(weights, LDM_UNET, path), original_config=original, torch_dtype=dtype, local_files_only=True
    )
    vae = AutoencoderKL.from_single_file(
        _part(weights, LDM_VAE, path), original_config=original, torch_dtype=dtype, local_files_only=True
    )
    folder = _text_folder(path, layout)
    tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    encoders = _single_encoders(weights, family, folder, tokenizer, dtype, path)
    alphas_cumprod = _alphas_cumprod(
        "scaled_linear", layout["linear_start"], layout["linear_end"], layout.get("timesteps", 1000), "ztsnr" in weights
    )
    prediction = _prediction(layout, weights)
    if prediction is None:
        prediction = _tried_prediction(unet, encoders[0].width, layout["image_size"] // 2, len(alphas_cumprod) - 1)
        layout["image_size"] = layout["image_size_of_v" if prediction == "v_prediction" else "image_size"]
    unet.register_to_config(sample_size=layout["image_size"])  # diffusers writes Stable Diffusion's own
    return _checked(
        Components(
            name=path.stem,
            hash=_short_hash(path),
            tokenizer=tokenizer,
            text_encoders=encoders,
            unet=unet,
            vae=vae,
            alphas_cumprod=alphas_cumprod,
            prediction=prediction,
            default_size=layout["image_size"] * 2 ** (len(vae.config.block_out_channels) - 1),
        )
    )


_REFINER = (
    "{} is an SDXL refiner, which continues pictures of another checkpoint and takes other embeddings. "
    "Give the base checkpoint."
)


def _family(weights: dict[str, Tensor], path: Path) -> str:
    """ "sd1", "sd2" or "sdxl", by the text encoders a checkpoint holds."""

    def holds(prefix: str) -> bool:
        return any(key.startswith(prefix) for key in weights)

    if holds(XL_SECOND):
        return "sdxl"
    if holds(XL_FIRST):
        raise ModelError(_REFINER.format(path))
    if holds(LDM_OPEN_CLIP):
        return "sd2"
    return "sd1"


def _prediction(layout: dict[str, Any], weights: dict[str, Tensor]) -> str | None:
    """What the U-Net predicts, as the .yaml or the file says; None where only trying can tell (Stable Diffusion 2)."""
    scaling = str(((layout.get("denoiser_config") or {}).get("params") or {}).get("scaling_config"))
    if layout.get("parameterization") == "v" or "v_pred" in weights or ".VScaling" in scaling:
        return "v_prediction"
    tells = "parameterization" in layout or "image_size_of_v" not in layout
    return "epsilon" if tells else None


@torch.no_grad()
def _tried_prediction(unet: UNet2DConditionModel, width: int, side: int, last: int) -> str:
    """Where a picture is almost all noise, a network that predicts noise gives back what it gets; one for v doesn't."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.config.in_channels, side, side, generator=generator).to(unet.dtype)
    text = torch.zeros(1, 1, width, dtype=unet.dtype)
    out = unet(x, torch.tensor([last]), text, return_dict=False)[0]
    likeness = torch.cosine_similarity(out.flatten().float(), x[:, : out.shape[1]].flatten().float(), dim=0)
    return "epsilon" if likeness > 0.5 else "v_prediction"


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
    return weights


def _part(weights: dict[str, Tensor], prefix: str, path: Path) -> dict[str, Tensor]:
    part = {key: value for key, value in weights.items() if key.startswith(prefix)}
    if not part:
        raise ModelError(
            f"{path} has no {prefix}* weights: it is not a whole checkpoint of Stable Diffusion 1, 2 or XL (a LoRA, "
            "a VAE?). Give the checkpoint itself."
        )
    return part


def _layout(path: Path, family: str, weights: dict[str, Tensor]) -> dict[str, Any]:
    """`model.params` of the .yaml beside the file (the webui's convention), or the family's published ones.

    Inpainting and instruct checkpoints of a family differ in the channels they take, which the weights say.
    """
    config, published = path.with_suffix(".yaml"), copy.deepcopy(LAYOUTS[family])
    network = "network_config" if family == "sdxl" else "unet_config"
    if config.exists():
        try:
            params = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["params"]
            params[network]["params"]["in_channels"]
        except (yaml.YAMLError, KeyError, TypeError) as error:
            raise ModelError(f"{config} is no layout of this checkpoint: it has no model.params.{network}.") from error
        # Without the key a webui takes what the original code takes: epsilon.
        layout = {**published, "parameterization": "eps", **params}
    else:
        layout = published
    first = weights.get(LDM_UNET + "input_blocks.0.0.weight")
    if first is not None:
        layout[network]["params"]["in_channels"] = first.shape[1]
    return layout


def _text_folder(path: Path, layout: dict[str, Any]) -> Path:
    """The folder with the vocabulary (and perhaps the text encoder's config.json) of a single file."""
    named = ((layout.get("cond_stage_config") or {}).get("params") or {}).get("version")
    candidates = [path.parent / named] if named else []
    candidates += [path.with_suffix(""), path.parent / "tokenizer", path.parent, vocabulary.BUNDLED]
    for folder in candidates:
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return folder
    raise ModelError(
        f"No CLIP vocabulary found for {path}: put vocab.json and merges.txt into {path.parent / 'tokenizer'}."
    )


def _single_encoders(
    weights: dict[str, Tensor], family: str, folder: Path, tokenizer: CLIPTokenizerFast, dtype: torch.dtype, path: Path
) -> tuple[TextEncoder, ...]:
    """The text encoders of a single file; OpenCLIP's are filled up with token 0."""
    if family == "sd1":
        model = _clip(_part(weights, LDM_TEXT, path), LDM_TEXT, folder, "quick_gelu", CLIPTextModel)
        return (_of_sd1(model.to(dtype), tokenizer),)
    if family == "sd2":
        tower = _from_open_clip(_part(weights, LDM_OPEN_CLIP, path), LDM_OPEN_CLIP)
        return (_of_sd2(_clip(tower, "", folder, "gelu", CLIPTextModel).to(dtype), pad=0, layer=2),)
    prefix = XL_FIRST + "transformer."
    first = _clip(_part(weights, prefix, path), prefix, folder, "quick_gelu", CLIPTextModel)
    tower = _from_open_clip(_part(weights, XL_SECOND + "model.", path), XL_SECOND + "model.")
    second = _clip(tower, "", folder, "gelu", CLIPTextModelWithProjection)
    return _of_sdxl(first.to(dtype), second.to(dtype), tokenizer, pad=0)


def _from_open_clip(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """An OpenCLIP text tower's weights under transformers' names; its attention's q, k and v come in one piece."""
    given = {key.removeprefix(prefix): value for key, value in weights.items()}
    out = {
        "embeddings.token_embedding.weight": given["token_embedding.weight"],
        "embeddings.position_embedding.weight": given["positional_embedding"],
        "final_layer_norm.weight": given["ln_final.weight"],
        "final_layer_norm.bias": given["ln_final.bias"],
    }
    if "text_projection" in given:
        out["text_projection.weight"] = given["text_projection"].T.contiguous()
    layers = {key.split(".")[2] for key in given if key.startswith("transformer.resblocks.")}
    for layer in layers:
        theirs, ours = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for name, open_clip in OPEN_CLIP_NAMES.items():
                out[f"{ours}{name}.{kind}"] = given[f"{theirs}{open_clip}.{kind}"]
            for name, piece in zip("qkv", given[f"{theirs}attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{ours}self_attn.{name}_proj.{kind}"] = piece.contiguous()
    return out


def _clip(weights: dict[str, Tensor], prefix: str, folder: Path, act: str, kind: type[CLIPTextModel]) -> CLIPTextModel:
    """A CLIP text model with a checkpoint's weights; its layout is read off them."""
    plain = {key.removeprefix(prefix).removeprefix("text_model."): value for key, value in weights.items()}
    plain.pop("embeddings.position_ids", None)
    rows, width = plain["embeddings.token_embedding.weight"].shape
    layers = 1 + max(int(key.split(".")[2]) for key in plain if key.startswith("encoder.layers."))
    known = _text_config(folder, width)
    projection = plain.pop("text_projection.weight", None)
    config = CLIPTextConfig(
        vocab_size=rows,
        hidden_size=width,
        intermediate_size=plain["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=layers,
        num_attention_heads=known.get("num_attention_heads") or _clip_heads(folder, width),
        max_position_embeddings=plain["embeddings.position_embedding.weight"].shape[0],
        hidden_act=known.get("hidden_act", act),
        projection_dim=width if projection is None else projection.shape[0],
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    model = kind(config)
    inside = "text_model." if hasattr(model, "text_model") else ""
    named = {inside + key: value.float() for key, value in plain.items()}
    if projection is not None and kind is CLIPTextModelWithProjection:
        named["text_projection.weight"] = projection.float()
    missing, _ = model.load_state_dict(named, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing:
        raise ModelError(
            f"The text encoder's weights are not complete: {missing[0]} and {len(missing) - 1} more are missing."
        )
    return model


def _text_config(folder: Path, width: int) -> dict[str, Any]:
    """The text part of a config.json (config_2.json) beside the vocabulary that is of an encoder of this width."""
    for path in sorted(folder.glob("config*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        values = values.get("text_config", values)
        if values.get("hidden_size") == width:
            return values
    return {}


def _clip_heads(folder: Path, width: int) -> int:
    """The number of attention heads can't be read off weights; every published CLIP has as many channels a head."""
    channels = LAYOUTS["text_head_channels"]
    if width % channels:
        raise ModelError(f"The text encoder is {width} wide, which is no CLIP's: put its config.json into {folder}.")
    return width // channels


def _alphas_cumprod(schedule: str, start: float, end: float, timesteps: int, zero_terminal: bool = False) -> Tensor:
    """prod(1 - beta), `[timesteps]`; Ho et al. 2020, with Stable Diffusion's scaled_linear betas.

    zero_terminal: its root moved and stretched so that the last is zero and the first stays; Lin et al. 2023.
    """
    if schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    elif schedule == "linear":
        betas = torch.linspace(start, end, timesteps, dtype=torch.float64)
    else:
        raise ModelError(f"The model's noise schedule is {schedule!r}; only scaled_linear and linear are known.")
    abar = torch.cumprod(1 - betas, 0)
    if zero_terminal:
        root = abar.sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        abar[-1] = ALMOST_ZERO
    return abar


def _short_hash(path: Path) -> str:
    """The first ten hex digits of the file's SHA-256, as the webui shows them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:10]


def _checked(parts: Components) -> Components:
    """Refuses what would run but mean something else."""
    extra, latent = parts.unet.config.in_channels - parts.vae.config.latent_channels, parts.vae.config.latent_channels
    if extra not in (0, latent, latent + 1):
        raise ModelError(f"{parts.name} takes {extra} channels besides the latent ones: its kind is not known here.")
    if parts.prediction not in ("epsilon", "v_prediction"):
        raise ModelError(f"{parts.name} predicts {parts.prediction!r}; only epsilon and v_prediction are known.")
    if parts.prediction == "epsilon" and parts.alphas_cumprod[-1] <= ALMOST_ZERO:
        raise ModelError(
            f"{parts.name} is marked for zero terminal SNR but not for v-prediction, and predicted noise means nothing "
            "there. If it predicts v, put a .yaml with parameterization: v (SDXL: the key v_pred) beside it."
        )
    width = sum(encoder.width for encoder in parts.text_encoders)
    if parts.unet.config.cross_attention_dim != width:
        raise ModelError(
            f"{parts.name}: the text encoders give {width} channels, "
            f"the U-Net takes {parts.unet.config.cross_attention_dim}."
        )
    return parts
