"""Two fine-tunes of the small model: what a word made on one checkpoint meets on its relatives.

    python -m tests.shapes_sd.variants            # trains both, a few minutes on one core
    python -m tests.shapes_sd.variants --write FOLDER      # writes the whole checkpoints, to try them by hand

Each goes on from the small model, text encoder and U-Net, on pictures of another style with the same captions. What is
kept is the difference, matrix by matrix the nearest one of rank RANK: some hundred kB instead of 20 MB.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lib_estimate.hosts import checkpoint
from tests.shapes_sd import export, pictures, train

HERE = Path(__file__).parent
BASE = HERE / "shapes_sd.safetensors"
RANK = 6
PICTURES, STEPS, BATCH = 400, 240, 8
RATES = {"unet": 4e-4, "text": 2e-4}
UNET, TEXT = "model.diffusion_model.", "cond_stage_model.transformer."


def dusk(picture: np.ndarray) -> np.ndarray:
    """Colours turned a third of the way round, and darker towards the bottom. uint8 `[H, W, 3]`."""
    light = np.linspace(1.0, 0.45, len(picture))[:, None, None]
    turned = 0.6 * picture + 0.4 * np.roll(picture, 1, axis=2)
    return (light * turned).astype(np.uint8)


def paper(picture: np.ndarray) -> np.ndarray:
    """Pale colours on ruled paper. uint8 `[H, W, 3]`."""
    pale = 0.55 * picture + 0.45 * 255
    pale[::12] = pale[1::12] = (150, 170, 210)
    return pale.astype(np.uint8)


STYLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"dusk": dusk, "paper": paper}


# ---- training -----------------------------------------------------------------------------------------------------


def fine_tuned(style: str, steps: int = STEPS) -> dict[str, Tensor]:
    """The weights of the U-Net and the text encoder after a short training, under LDM's names."""
    torch.manual_seed(train.SEED)
    parts = checkpoint.load(BASE, torch.float32)
    unet, text = parts.unet, parts.text_encoders[0].model
    latents, ids, empty = _data(style, parts.vae)
    text.requires_grad_(True)
    train.text_part(text).embeddings.token_embedding.requires_grad_(False)
    train.text_part(text).final_layer_norm.bias.requires_grad_(False)  # see train.new_text_encoder
    groups = {"unet": unet.requires_grad_(True), "text": text}
    optimizer = torch.optim.Adam(
        [{"params": [p for p in net.parameters() if p.requires_grad], "lr": RATES[key]} for key, net in groups.items()]
    )
    abar, started = train.alphas_cumprod(), time.time()
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, RATES.values(), strict=True):
            group["lr"] = train.schedule(step, steps, rate, warm=20)
        pick, t = torch.randint(0, len(latents), (BATCH,)), torch.randint(0, len(abar), (BATCH,))
        given = torch.where((torch.rand(BATCH) < train.EMPTY_SHARE)[:, None], empty, ids[pick])
        x0, a = latents[pick], abar[t][:, None, None, None]
        noise = torch.randn_like(x0)
        eps = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text(given).last_hidden_state, return_dict=False)[0]
        loss = (train.loss_weight(abar[t]) * (eps - noise).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for net in groups.values() for p in net.parameters()], 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(style, step, f"{loss.item():.4f}", f"{time.time() - started:.0f} s", flush=True)
    out = {UNET + key: value for key, value in export.ldm_unet(unet.state_dict()).items()}
    return out | {TEXT + _text_name(key): value for key, value in text.state_dict().items()}


def _text_name(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"


@torch.no_grad()
def _data(style: str, vae: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Latents `[N, c, h, w]` of pictures in a style, their captions `[N, T]`, and the empty caption `[T]`."""
    rng, tokenizer = random.Random(train.SEED), CLIPTokenizer.from_pretrained(HERE / "tokenizer")
    scenes = [pictures.random_scene(rng) for _ in range(PICTURES)]
    captions = [pictures.caption(scene, rng) for scene in scenes]
    drawn = np.stack([STYLES[style](pictures.draw(scene, rng)) for scene in scenes])
    x = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = torch.cat([vae.encode(piece).latent_dist.mean for piece in x.split(16)]) * vae.config.scaling_factor
    ids = tokenizer(["", *captions], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return latents, ids.input_ids[1:], ids.input_ids[0]


# ---- the difference -----------------------------------------------------------------------------------------------


def difference(tuned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The change of each weight, float16: `NAME` for a single row, else `NAME.up` `[out, r]`, `NAME.down` `[r, in]`."""
    out, base = {}, load_file(BASE)
    for key, value in tuned.items():
        if key not in base or torch.equal(value.half(), base[key]):
            continue
        change = (value.float() - base[key].float()).flatten(1) if value.ndim > 1 else value - base[key].float()
        if change.ndim == 1:
            out[key] = change.half()
            continue
        u, s, v = torch.linalg.svd(change, full_matrices=False)
        out[f"{key}.up"], out[f"{key}.down"] = ((u * s)[:, :RANK].half(), v[:RANK].half())
    return {key: value.contiguous() for key, value in out.items()}


def whole(style: str) -> dict[str, Tensor]:
    """The variant's checkpoint, under LDM's names."""
    weights, changes = load_file(BASE), load_file(HERE / f"{style}.safetensors")
    for key, base in weights.items():
        if key in changes:
            weights[key] = (base.float() + changes[key].float()).half()
        elif f"{key}.up" in changes:
            change = changes[f"{key}.up"].float() @ changes[f"{key}.down"].float()
            weights[key] = (base.float() + change.view(base.shape)).half()
    return weights


def write(style: str, folder: Path) -> Path:
    """Writes the variant as a checkpoint that hosts load, with what must lie beside it."""
    path = folder / f"{style}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    export.save(whole(style), path)
    shutil.copy(BASE.with_suffix(".yaml"), path.with_suffix(".yaml"))
    shutil.copytree(HERE / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write the checkpoints that there are")
    parser.add_argument("--style", choices=STYLES, help="only this one")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    for style in [args.style] if args.style else STYLES:
        if args.write:
            print(write(style, args.write))
        else:
            save_file(difference(fine_tuned(style, args.steps)), HERE / f"{style}.safetensors")


if __name__ == "__main__":
    main()
