"""Models of Stable Diffusion 1's and XL's size with random weights: they draw nothing, but a step on them costs what it
costs. On PyTorch's meta device they take no memory, and say what one would."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lib_estimate.hosts import checkpoint
from lib_estimate.hosts.layouts import LAYOUTS
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.prompt import vocabulary
from lib_estimate.request import Emphasis, ModelOptions

WIDTHS, POSITIONS, VOCABULARY = (768, 1280), 77, 49408
CHANNELS = (128, 256, 512, 512)  # of the VAE
SIDE = {"sd1": 64, "sdxl": 128}  # of the latents


def random_host(device: str, dtype: str, family: str = "sd1") -> StandaloneHost:
    """A host that holds such a model, made in memory: in float32 4 GB for Stable Diffusion 1, 14 GB for XL."""
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"

    def components(_, wanted: torch.dtype) -> checkpoint.Components:
        return _components(torch.device(place), wanted, family)

    # Emphasis as in "Original" divides by the hidden states' mean, which is zero where the weights are random.
    options = ModelOptions(model="random", device=device, dtype=dtype, emphasis=Emphasis.NO_NORM)
    with mock.patch.object(checkpoint, "load", components):
        return StandaloneHost(options)


def _components(device: torch.device, dtype: torch.dtype, family: str) -> checkpoint.Components:
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(vocabulary.BUNDLED, local_files_only=True)
    layout = LAYOUTS[family]
    with device, _made_in(dtype):
        unet = _unet(family)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
            block_out_channels=CHANNELS,
            layers_per_block=2,
        )
        first = CLIPTextModel(_text_config(WIDTHS[0], layers=12, act="quick_gelu"))
        if family == "sdxl":
            second = CLIPTextModelWithProjection(_text_config(WIDTHS[1], layers=32, act="gelu"))
            encoders = checkpoint._of_sdxl(first, second, tokenizer, pad=0)
        else:
            encoders = (checkpoint._of_sd1(first, tokenizer),)
    return checkpoint.Components(
        name="random-full-size",
        hash=None,
        tokenizer=tokenizer,
        text_encoders=encoders,
        unet=unet,
        vae=vae,
        alphas_cumprod=checkpoint._alphas_cumprod(
            "scaled_linear", layout["linear_start"], layout["linear_end"], layout["timesteps"]
        ),
        prediction="epsilon",
        default_size=8 * SIDE[family],
    )


@contextmanager
def _made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights begin in this format: made in float32 and then turned, they would need the memory of both."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _unet(family: str) -> UNet2DConditionModel:
    if family == "sd1":
        return UNet2DConditionModel(sample_size=SIDE[family], cross_attention_dim=WIDTHS[0], attention_head_dim=8)
    return UNet2DConditionModel(
        sample_size=SIDE[family],
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=WIDTHS[1] + 6 * 256,
    )


def _text_config(width: int, layers: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=POSITIONS,
        hidden_act=act,
    )
