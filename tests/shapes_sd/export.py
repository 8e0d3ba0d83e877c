"""Writes the trained networks as one LDM-layout file, `shapes_sd.safetensors`: what a webui loads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.shapes_sd import train

HERE = Path(__file__).parent
TABLE = "text_model.embeddings.token_embedding.weight"
ROWS = 49_408
LDM_SCALE = 0.18215  # the webuis' own scale of latents; the VAE is changed to fit it


def export(work: Path, path: Path | None = None) -> None:
    """Reads what the training left in `work` and writes the file; without a path over the project's own."""
    unet, text, data = train.averaged(work)
    vae, scale = torch.load(work / "vae.pt"), float(torch.load(work / "latents.pt")["scale"])
    weights = whole(unet.state_dict(), vae, text.state_dict(), data.used_ids, scale)
    save(weights, path or HERE / "shapes_sd.safetensors")


def whole(
    unet: dict[str, Tensor], vae: dict[str, Tensor], text: dict[str, Tensor], used: Tensor, scale: float
) -> dict[str, Tensor]:
    """All weights under LDM's names. scale: what the VAE's latents were multiplied with in training."""
    parts = {
        "model.diffusion_model": ldm_unet(unet),
        "first_stage_model": ldm_vae(rescaled(vae, scale / LDM_SCALE)),
        "cond_stage_model.transformer": full_text(text, used),
    }
    return {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.items()}


def save(weights: dict[str, Tensor], path: Path) -> None:
    halves = {key: value.detach().half().contiguous() for key, value in weights.items()}
    save_file(halves, path, metadata={"format": "pt", "license": "MIT"})
    path.chmod(0o644)


def full_text(text: dict[str, Tensor], used: Tensor) -> dict[str, Tensor]:
    """The text encoder with the whole token table: rows never trained are drawn with the statistics of the others."""
    out = {
        k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text.items() if "position_ids" not in k
    }
    rows = out[TABLE]
    generator = torch.Generator().manual_seed(train.SEED)
    noise = torch.randn(ROWS, rows.shape[1], generator=generator)
    out[TABLE] = (rows.mean(0) + rows.std(0) * noise).index_copy(0, used, rows)
    return out


def rescaled(vae: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same autoencoder with latents `factor` times as large."""
    out = dict(vae)
    mean, log_variance = slice(0, 4), slice(4, 8)
    weight, bias = out["quant_conv.weight"].clone(), out["quant_conv.bias"].clone()
    weight[mean] *= factor
    bias[mean] *= factor
    bias[log_variance] += 2 * torch.log(torch.tensor(factor))
    out["quant_conv.weight"], out["quant_conv.bias"] = weight, bias
    out["post_quant_conv.weight"] = out["post_quant_conv.weight"] / factor
    return out


# ---- names --------------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip


def ldm_unet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> LDM's, for two levels of one block each."""
    places = {"conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2."}
    places |= {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2."}
    places |= {"add_embedding.linear_1.": "label_emb.0.0.", "add_embedding.linear_2.": "label_emb.0.2."}
    for level, block in enumerate((1, 3)):
        places[f"down_blocks.{level}.resnets.0."] = f"input_blocks.{block}.0."
        places[f"down_blocks.{level}.attentions.0."] = f"input_blocks.{block}.1."
    places["down_blocks.0.downsamplers.0.conv."] = "input_blocks.2.0.op."
    places |= {"mid_block.resnets.0.": "middle_block.0.", "mid_block.attentions.0.": "middle_block.1."}
    places["mid_block.resnets.1."] = "middle_block.2."
    for level in range(2):
        for block in range(2):
            places[f"up_blocks.{level}.resnets.{block}."] = f"output_blocks.{2 * level + block}.0."
            places[f"up_blocks.{level}.attentions.{block}."] = f"output_blocks.{2 * level + block}.1."
    places["up_blocks.0.upsamplers.0.conv."] = "output_blocks.1.2.conv."
    return {_renamed(key, places, RESNET): value for key, value in weights.items()}


def ldm_vae(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> LDM's, for four levels; the middle attention becomes 1x1 convolutions."""
    places = {}
    for level in range(4):
        for block in range(2):
            places[f"encoder.down_blocks.{level}.resnets.{block}."] = f"encoder.down.{level}.block.{block}."
            places[f"decoder.up_blocks.{level}.resnets.{block}."] = f"decoder.up.{3 - level}.block.{block}."
        places[f"encoder.down_blocks.{level}.downsamplers.0."] = f"encoder.down.{level}.downsample."
        places[f"decoder.up_blocks.{level}.upsamplers.0."] = f"decoder.up.{3 - level}.upsample."
    for side in ("encoder.", "decoder."):
        places |= {f"{side}mid_block.resnets.{i}.": f"{side}mid.block_{i + 1}." for i in range(2)}
        places |= {f"{side}mid_block.attentions.0.": f"{side}mid.attn_1.", f"{side}conv_norm_out.": f"{side}norm_out."}
    inner = {"conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    inner["to_out.0"] = "proj_out"
    out = {}
    for key, value in weights.items():
        if ".attentions." in key and value.ndim == 2:
            value = value[:, :, None, None]
        out[_renamed(key, places, inner)] = value
    return out


def _renamed(key: str, places: dict[str, str], inner: dict[str, str]) -> str:
    for old, new in places.items():
        if key.startswith(old):
            rest = key[len(old) :]
            for name, ldm in inner.items():
                if rest.startswith(name + "."):
                    rest = ldm + rest[len(name) :]
            return new + rest
    return key
