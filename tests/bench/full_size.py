"""A model of Stable Diffusion 1's size with random weights: it draws nothing, but a step on it costs what it costs."""

from __future__ import annotations

from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.request import ModelOptions

WIDTH, POSITIONS, VOCABULARY = 768, 77, 49408
CHANNELS = (128, 256, 512, 512)  # of the VAE


def random_host(device: str, dtype: str) -> StandaloneHost:
    """A host that holds such a model, made in memory: 4 GB in float32."""
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with mock.patch.object(checkpoint, "load", lambda _, wanted: _components(torch.device(place), wanted)):
        return StandaloneHost(ModelOptions(model="random", device=device, dtype=dtype))


def _components(device: torch.device, dtype: torch.dtype) -> checkpoint.Components:
    torch.manual_seed(0)
    with device:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=WIDTH, attention_head_dim=8)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
            block_out_channels=CHANNELS,
            layers_per_block=2,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=POSITIONS,
                hidden_act="quick_gelu",
            )
        )
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint.BUNDLED_VOCABULARY, local_files_only=True)
    layout = LAYOUTS["sd1"]
    return checkpoint.Components(
        name="random-full-size",
        hash=None,
        tokenizer=tokenizer,
        text_encoders=(checkpoint._of_sd1(text_encoder.to(dtype), tokenizer),),
        unet=unet.to(dtype),
        vae=vae.to(dtype),
        alphas_cumprod=checkpoint._alphas_cumprod(
            "scaled_linear", layout["linear_start"], layout["linear_end"], layout["timesteps"]
        ),
        prediction="epsilon",
        default_size=512,
    )
