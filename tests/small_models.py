"""Small models of the Stable Diffusion 2 and XL families, with random weights from a seed: they draw nothing, but read
prompts, take pooled vectors and sizes, and answer text, the way the large ones do."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tests.shapes_sd.export import ldm_unet, ldm_vae

VOCABULARY = Path(__file__).parent / "shapes_sd" / "tokenizer"
FIRST, SECOND = 32, 48  # widths of the text encoders
SIDE, EACH = 8, 8  # latent pixels one way; channels of each of SDXL's six sizes
HEADS, HEAD_CHANNELS = 4, 16
LEVELS, VAE_LEVELS = (32, 64), (32, 32, 32, 64)
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.": "attn.",
}


@dataclass
class SmallModel:
    """The networks of a small model, and how it is written."""

    family: str  # "sd2" or "sdxl"
    prediction: str
    texts: list[CLIPTextModel]
    unet: UNet2DConditionModel
    vae: AutoencoderKL

    def pipeline(self) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        """diffusers' own, with a deterministic sampler."""
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=self.prediction,
        )  # fmt: skip
        shared: dict[str, Any] = {"vae": self.vae, "unet": self.unet, "scheduler": scheduler}
        first = CLIPTokenizer.from_pretrained(VOCABULARY)
        other = CLIPTokenizer.from_pretrained(VOCABULARY, pad_token="!")
        if self.family == "sdxl":
            made = StableDiffusionXLPipeline(
                **shared, text_encoder=self.texts[0], text_encoder_2=self.texts[1], tokenizer=first, tokenizer_2=other,
                add_watermarker=False,
            )  # fmt: skip
        else:
            made = StableDiffusionPipeline(
                **shared, text_encoder=_without_last_layer(self.texts[0]), tokenizer=other, safety_checker=None,
                feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
        made.set_progress_bar_config(disable=True)
        return made

    def single_file(self, path: Path) -> Path:
        """Writes the layout of the original code, and beside it the .yaml and the vocabulary."""
        first, *second = self.texts
        parts = {"model.diffusion_model": ldm_unet(self.unet.state_dict())}
        parts["first_stage_model"] = ldm_vae(self.vae.state_dict())
        if second:
            plain = {f"text_model.{key.removeprefix('text_model.')}": v for key, v in first.state_dict().items()}
            parts["conditioner.embedders.0.transformer"] = plain
            parts["conditioner.embedders.1.model"] = open_clip(second[0])
        else:
            parts["cond_stage_model.model"] = open_clip(first)
        weights = {f"{prefix}.{key}": value for prefix, part in parts.items() for key, value in part.items()}
        save_file({key: value.contiguous().clone() for key, value in weights.items()}, path)
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"model": {"params": self._layout()}}))
        (path.parent / "tokenizer").mkdir(exist_ok=True)
        for file in VOCABULARY.glob("*"):
            if not file.name.startswith("config"):
                (path.parent / "tokenizer" / file.name).write_bytes(file.read_bytes())
        for number, text in enumerate(self.texts):
            name = "config.json" if number == 0 else f"config_{number + 1}.json"
            known = {k: getattr(text.config, k) for k in ("hidden_size", "num_attention_heads", "hidden_act")}
            (path.parent / "tokenizer" / name).write_text(json.dumps(known))
        return path

    def _layout(self) -> dict[str, Any]:
        network = {
            "in_channels": 4, "out_channels": 4, "model_channels": LEVELS[0], "attention_resolutions": [2, 1],
            "num_res_blocks": 1, "channel_mult": [1, 2], "num_head_channels": HEAD_CHANNELS,
            "use_linear_in_transformer": True, "transformer_depth": [1, 2],
            "context_dim": sum(text.config.hidden_size for text in self.texts),
        }  # fmt: skip
        vae = {
            "in_channels": 3, "out_ch": 3, "ch": VAE_LEVELS[0], "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1,
            "z_channels": 4, "resolution": 64,
        }  # fmt: skip
        layout: dict[str, Any] = {"image_size": SIDE, "first_stage_config": {"params": {"ddconfig": vae}}}
        if self.family == "sdxl":
            network |= {"num_classes": "sequential", "adm_in_channels": SECOND + 6 * EACH}
            return layout | {"network_config": {"params": network}}
        if self.prediction == "v_prediction":
            layout["parameterization"] = "v"
        return layout | {"unet_config": {"params": network}}


def open_clip(model: CLIPTextModel) -> dict[str, Tensor]:
    """A text tower's weights as OpenCLIP has them: q, k and v in one piece, the projection the other way round."""
    out: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name = key.removeprefix("text_model.")
        if name == "text_projection.weight":
            out["text_projection"] = value.T
            continue
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        out[name] = value
    for key in [key for key in out if "attn.q_proj" in key]:
        pieces = [out.pop(key.replace("q_proj", f"{which}_proj")) for which in "qkv"]
        out[key.replace("q_proj.", "in_proj_")] = torch.cat(pieces)
    return out


def small_model(family: str, prediction: str = "epsilon", in_channels: int = 4) -> SmallModel:
    torch.manual_seed(0)
    if family == "sdxl":
        texts = [_text(CLIPTextModel, FIRST, "quick_gelu"), _text(CLIPTextModelWithProjection, SECOND, "gelu")]
        added = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": EACH,
            "projection_class_embeddings_input_dim": SECOND + 6 * EACH,
        }  # fmt: skip
    else:
        texts, added = [_text(CLIPTextModel, SECOND, "gelu")], {}
    unet = UNet2DConditionModel(
        sample_size=SIDE, in_channels=in_channels, block_out_channels=LEVELS, layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=sum(text.config.hidden_size for text in texts), transformer_layers_per_block=(1, 2),
        attention_head_dim=tuple(width // HEAD_CHANNELS for width in LEVELS), use_linear_projection=True, **added,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=VAE_LEVELS, layers_per_block=1, sample_size=8 * SIDE,
        scaling_factor=0.13025 if family == "sdxl" else 0.18215,
    )  # fmt: skip
    _listen(unet)
    return SmallModel(family, prediction, texts, unet.eval(), vae.eval())


def _text(kind: type[CLIPTextModel], width: int, act: str) -> CLIPTextModel:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=HEADS,
        projection_dim=width, hidden_act=act, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    model = kind(config).eval()
    # "Original" emphasis divides by the mean of the states, which is near zero without this, and isn't in real CLIPs.
    getattr(model, "text_model", model).final_layer_norm.bias.data.fill_(-0.1)
    return model


def _without_last_layer(text: CLIPTextModel) -> CLIPTextModel:
    """As diffusers keeps the text encoder of Stable Diffusion 2: it ends with the layer that is read."""
    config = copy.deepcopy(text.config)
    config.num_hidden_layers -= 1
    shorter = CLIPTextModel(config)
    shorter.load_state_dict(text.state_dict(), strict=False)
    return shorter.eval()


@torch.no_grad()
def _listen(unet: nn.Module) -> None:
    """Makes what the U-Net says depend on the text as much as a trained one's does."""
    for name, parameter in unet.named_parameters():
        if name.endswith(("attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_out.0.weight")):
            parameter *= 3
