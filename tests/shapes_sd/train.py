"""Trains the small model: a Stable Diffusion 1 of about ten million parameters that draws coloured shapes.

    python -m tests.shapes_sd.train WORKDIR            # all stages, about three hours on two cores
    python -m tests.shapes_sd.train WORKDIR --stage unet --steps 8000

A second model of the same make, to judge on what was never tuned on, from another seed and over the first one's VAE:

    python -m tests.shapes_sd.train WORKDIR --seed 7771 --vae-of tests/shapes_sd/shapes_sd.safetensors --out FILE

Stages: `text` (the text encoder learns to name what a caption says, as the real one was pre-trained on captions),
`vae`, `latents`, `unet` (with the text encoder), `decoder` (of the VAE, for longer), `export`. Every stage writes a
file into WORKDIR and the next one reads it; `vae` and `unet` continue from what is there. Two single-threaded processes
with averaged gradients: on a busy machine two OpenMP threads in one process were far slower.

The committed weights: the U-Net's first 3,500 steps saw captions that left out more of the scene, and only its last
1,000 had `loss_weight` as it is now (before: without the 0.15); all else is as it stands here.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.shapes_sd import pictures

HERE = Path(__file__).parent
WORLD = 2  # processes, unless told otherwise
PICTURES = 24_000
CAPTIONS_EACH = 4
SEED = 20_261_120  # unless told otherwise
WORDS_LOST = 0.1  # see with_gaps
BATCHES = ((0.5, 16), (1.0, 32))  # per process; (until this share of the steps, samples): many small steps first
EMPTY_SHARE = 0.1  # captions dropped, so that the empty prompt means something under CFG
WIDTH = 96  # of the text encoder
VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (32, 32, 32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "norm_num_groups": 32,
}
UNET_CONFIG = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 128),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 32,
}


def text_config(rows: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=rows, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", projection_dim=WIDTH,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,  # as in the real CLIP-L's config.json
    )  # fmt: skip


def alphas_cumprod() -> Tensor:
    """scaled_linear 0.00085-0.012 over 1000 timesteps, as Stable Diffusion 1."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


# ---- data ---------------------------------------------------------------------------------------------------------


class Data:
    """Scenes, their captions as token ids into the table of used rows, and (after `latents`) their latents."""

    def __init__(self) -> None:
        rng = random.Random(SEED)
        tokenizer = CLIPTokenizer.from_pretrained(HERE / "tokenizer")
        self.scenes = [pictures.random_scene(rng) for _ in range(PICTURES)]
        captions = [pictures.caption(scene, rng) for scene in self.scenes for _ in range(CAPTIONS_EACH)]
        ids = tokenizer(["", *captions], padding="max_length", truncation=True, max_length=77).input_ids
        words, compact = np.unique(np.array(ids), return_inverse=True)
        self.used_ids = torch.from_numpy(words)  # [rows]: compact row -> real token id
        rows = torch.from_numpy(compact.reshape(len(ids), 77))
        self.empty, self.captions = rows[0], rows[1:].view(PICTURES, CAPTIONS_EACH, 77)
        kinds = {"nouns": pictures.SHAPES, "colours": pictures.BACKGROUNDS, "background": ("background",)}
        self.words = {  # compact rows of each kind of word
            kind: torch.tensor([int((words == tokenizer(s).input_ids[1]).nonzero()[0][0]) for s in spelled])
            for kind, spelled in kinds.items()
        }

    def picture(self, index: int) -> np.ndarray:
        return pictures.draw(self.scenes[index], random.Random(SEED + index))

    def labels(self) -> dict[str, Tensor]:
        """What a caption can be asked about, `[PICTURES]` class numbers each; -1 where it doesn't apply."""
        colours, sizes = list(pictures.BACKGROUNDS), ["large", "small"]
        relations = [*pictures.PLACES, *pictures.RELATIONS]
        out: dict[str, list[int]] = {"background": [], "relation": []}
        for scene in self.scenes:
            out["background"].append(colours.index(scene.background))
            out["relation"].append(relations.index(scene.relation or scene.place))
            for k in range(2):
                thing = scene.things[k] if k < len(scene.things) else None
                for name, of in (("colour", colours), ("size", sizes)):
                    out.setdefault(f"{name}{k}", []).append(of.index(getattr(thing, name)) if thing else -1)
        return {name: torch.tensor(values) for name, values in out.items()}


def average_gradients(parameters: list[nn.Parameter]) -> None:
    flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for p in parameters:
        p.grad = flat[start : start + p.numel()].view_as(p).clone()
        start += p.numel()


def schedule(step: int, steps: int, peak: float, warm: int = 100) -> float:
    """Warm-up, flat, then linear to zero over the last 30%."""
    return peak * min(1.0, (step + 1) / warm, max(0.0, (steps - step) / (0.3 * steps)))


def say(*words: object) -> None:
    if dist.get_rank() == 0:
        print(time.strftime("%H:%M:%S"), *words, flush=True)


# ---- stage: text --------------------------------------------------------------------------------------------------


class Questions(nn.Module):
    """Linear heads that answer, from the last hidden state of a word, what the caption says of that word.

    They ask at words only. Asked at the end-of-text or at the padding, which know the whole sentence, the text encoder
    and then the U-Net learn to read everything there, and the weight of a word does nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        colours, relations = len(pictures.BACKGROUNDS), len(pictures.PLACES) + len(pictures.RELATIONS)
        sizes = {"colour": colours, "size": 2, "relation": relations, "background": colours, "belongs": 3}
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, count) for name, count in sizes.items()})

    def loss(self, z: Tensor, ids: Tensor, labels: dict[str, Tensor], words: dict[str, Tensor]) -> Tensor:
        """z [B, T, C]: each thing's colour and size at its noun, the relation at the second noun, the background's
        colour at "background", and at a colour what it belongs to (first thing, second thing, background)."""
        total = z.new_zeros(())
        two = labels["colour1"] >= 0
        for k in range(2):
            noun, colour = nth(ids, words["nouns"], k), nth(ids, words["colours"], k)
            for name in ("colour", "size"):
                total = total + self._ask(name, z, noun, labels[f"{name}{k}"])
            total = total + self._ask("belongs", z, colour, torch.where(two | (k == 0), k, 2))
        total = total + self._ask("relation", z, nth(ids, words["nouns"], 1), labels["relation"])
        total = total + self._ask("belongs", z, nth(ids, words["colours"], 2), torch.full_like(labels["relation"], 2))
        return total + self._ask("background", z, nth(ids, words["background"], 0), labels["background"])

    def _ask(self, name: str, z: Tensor, where: tuple[Tensor, Tensor], label: Tensor) -> Tensor:
        there, position = where
        state = z[torch.arange(len(z)), position]
        return F.cross_entropy(self.heads[name](state), torch.where(there, label, -1), ignore_index=-1)


def nth(ids: Tensor, words: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Whether and where the k-th (from 0) of `words` stands in each row of ids `[B, T]`; `[B]` and `[B]`."""
    hit = torch.isin(ids, words)
    hit &= hit.cumsum(1) == k + 1
    return hit.any(1), hit.float().argmax(1)


def new_text_encoder(rows: int) -> CLIPTextModel:
    model = CLIPTextModel(text_config(rows))
    nn.init.normal_(text_part(model).embeddings.token_embedding.weight, std=0.4 / WIDTH**0.5)
    # The real CLIP's states have a mean of about -0.1; "Original" emphasis divides by it.
    bias = text_part(model).final_layer_norm.bias
    bias.requires_grad_(False).fill_(-0.1)
    return model


def text_part(model: CLIPTextModel) -> nn.Module:
    return getattr(model, "text_model", model)


def train_text(work: Path, steps: int) -> None:
    data, rank = Data(), dist.get_rank()
    labels = data.labels()
    torch.manual_seed(SEED)
    model = new_text_encoder(len(data.used_ids))
    asked = Questions()
    parameters = [p for p in [*model.parameters(), *asked.parameters()] if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    torch.manual_seed(SEED + 1 + rank)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 2e-3)
        pick = torch.randint(0, PICTURES, (128,))
        ids = data.captions[pick, torch.randint(0, CAPTIONS_EACH, (128,))][:, :40]
        z = model(ids).last_hidden_state
        loss = asked.loss(z, ids, {name: v[pick] for name, v in labels.items()}, data.words)
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            say("text", step, f"{loss.item():.3f}")
    if rank == 0:
        torch.save(model.state_dict(), work / "text.pt")


# ---- stage: vae ---------------------------------------------------------------------------------------------------


def picture_batch(data: Data, indices: list[int]) -> Tensor:
    """[B, 3, SIZE, SIZE] in -1..1."""
    stack = np.stack([data.picture(i) for i in indices])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(work: Path, steps: int, decoder_only: bool = False) -> None:
    data, rank = Data(), dist.get_rank()
    torch.manual_seed(SEED)
    vae = AutoencoderKL(**VAE_CONFIG)
    if (work / "vae.pt").exists():
        vae.load_state_dict(torch.load(work / "vae.pt"))
    parameters = list(vae.parameters())
    if decoder_only:
        parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    rng = random.Random(SEED + rank)
    torch.manual_seed(SEED + 1 + rank)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = schedule(step, steps, 1e-3 if decoder_only else 2e-3)
        whole = step >= 0.9 * steps  # pieces of pictures teach the same at a quarter of the cost
        x = picture_batch(data, [rng.randrange(PICTURES) for _ in range(4 if whole else 8)])
        if not whole:
            top, left = rng.randrange(8) * 8, rng.randrange(8) * 8
            x = x[:, :, top : top + 64, left : left + 64].contiguous()
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not decoder_only):
                latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample.float()
        kl = latent.kl().float().mean() / x[0].numel()
        loss = (y - x).abs().mean() + (y - x).square().mean() + 3e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0:
            say("vae", step, f"{loss.item():.4f} kl {kl.item():.3f} mse {(y - x).square().mean().item():.5f}")
    if rank == 0:
        torch.save(vae.state_dict(), work / "vae.pt")


def polish_decoder(work: Path, steps: int) -> None:
    """Trains the decoder alone for longer: the latents, and so the U-Net, stay as they are."""
    train_vae(work, steps, decoder_only=True)


def make_latents(work: Path, steps: int) -> None:
    """Latents of every picture, scaled to a standard deviation of one; each process does its half."""
    data, rank = Data(), dist.get_rank()
    vae = AutoencoderKL(**VAE_CONFIG)
    vae.load_state_dict(torch.load(work / "vae.pt"))
    vae.eval()
    latents = torch.zeros(PICTURES, 4, SIZE_LATENT, SIZE_LATENT)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(32 * rank, PICTURES, 32 * WORLD):
            x = picture_batch(data, list(range(start, min(start + 32, PICTURES))))
            latents[start : start + 32] = vae.encode(x).latent_dist.mean.float()
            if (start // 32) % 100 == 0:
                say("latents", start)
    dist.all_reduce(latents)
    scale = 1 / latents.std()
    if rank == 0:
        torch.save({"latents": (latents * scale).half(), "scale": scale}, work / "latents.pt")
        say("scale", scale.item())


SIZE_LATENT = pictures.SIZE // 8


# ---- stage: unet --------------------------------------------------------------------------------------------------


class FloatAttention:
    """Attention in float32: the bfloat16 backward of CPU attention takes six times as long."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            z.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
            for z in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


def loss_weight(abar: Tensor) -> Tensor:
    """Weight of the squared eps error, `[B]`: max(min(SNR, 5) / SNR, 0.15) + 0.1 / (SNR + 0.01).

    Min-SNR weighting, and a little more at the noisy end, where colours and the background are decided: without it
    they aren't learnt in the steps there are; with as much of it as v-prediction has, shapes aren't. The 0.15 is for
    the last steps of a generation: left almost untrained, they answer the prompt's words with noise.
    """
    snr = abar / (1 - abar)
    return (snr.clamp(max=5) / snr).clamp(min=0.15) + 0.1 / (snr + 0.01)


def with_gaps(z: Tensor, ids: Tensor, nothing: Tensor) -> Tensor:
    """In half of the samples: states `[B, T, C]` after the text are those of the empty prompt `[1, T, C]`, and one
    word in ten is.

    The states of the padding know the whole sentence, and a noun's knows its adjectives. A U-Net that may always rely
    on them learns to read nothing else; then the weight of a word, which scales that word's own state, does nothing.
    """
    half = torch.rand(len(ids), 1) < 0.5
    after = torch.arange(ids.shape[1]) >= ids.argmax(1, keepdim=True)
    lost = torch.rand(ids.shape) < WORDS_LOST
    lost[:, 0] = False
    return torch.where((half & (after | lost))[..., None], nothing, z)


class Average:
    """Exponential moving average of the weights."""

    def __init__(self, parameters: list[nn.Parameter], decay: float = 0.9985) -> None:
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)


def train_unet(work: Path, steps: int) -> None:
    data, rank = Data(), dist.get_rank()
    latents = torch.load(work / "latents.pt")["latents"]
    torch.manual_seed(SEED)
    text = new_text_encoder(len(data.used_ids))
    text.load_state_dict(torch.load(work / "text.pt"))
    unet = UNet2DConditionModel(**UNET_CONFIG).to(memory_format=torch.channels_last)
    unet.set_attn_processor(FloatAttention())
    groups = [list(unet.parameters()), [p for p in text.parameters() if p.requires_grad]]
    parameters = groups[0] + groups[1]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], lr=1e-3, weight_decay=1e-3, betas=(0.9, 0.99))
    average, first = Average(parameters), 0
    saved = work / "unet_checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        unet.load_state_dict(state["unet"]), text.load_state_dict(state["text"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.count, first = state["average"], state["count"], state["step"]
    torch.manual_seed(SEED + 1 + rank + 1000 * first)
    abar = alphas_cumprod()
    forward = torch.compile(unet, dynamic=False)
    started, running = time.time(), 0.0
    for step in range(first, steps):
        rate = schedule(step, steps, 1e-3, warm=200)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, 0.3 * rate
        batch = next(size for share, size in BATCHES if step < share * steps)
        pick = torch.randint(0, PICTURES, (batch,))
        ids = data.captions[pick, torch.randint(0, CAPTIONS_EACH, (batch,))]
        ids = torch.where((torch.rand(batch) < EMPTY_SHARE)[:, None], data.empty, ids)
        x0, t = latents[pick].float(), torch.randint(0, 1000, (batch,))
        noise, a = torch.randn_like(x0), abar[t][:, None, None, None]
        xt = (a.sqrt() * x0 + (1 - a).sqrt() * noise).to(memory_format=torch.channels_last)
        z = text(torch.cat([data.empty[None], ids])).last_hidden_state
        z = with_gaps(z[1:], ids, z[:1].detach())
        with torch.autocast("cpu", torch.bfloat16):
            eps = forward(xt, t, z, return_dict=False)[0]
        error = (eps.float() - noise).square().mean((1, 2, 3))
        loss = (loss_weight(abar[t]) * error).mean()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update()
        running = 0.98 * running + 0.02 * loss.item() if step > first else loss.item()
        if step % 50 == 0:
            say("unet", step, f"{running:.4f}", f"{(time.time() - started) / (step - first + 1):.3f} s/step")
        if rank == 0 and ((step + 1) % 250 == 0 or step + 1 == steps):
            state = {"unet": unet.state_dict(), "text": text.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"average": average.values, "count": average.count, "step": step + 1}
            torch.save(state, work / "unet_checkpoint.tmp")
            (work / "unet_checkpoint.tmp").replace(saved)


def averaged(work: Path) -> tuple[UNet2DConditionModel, CLIPTextModel, Data]:
    """The trained networks with averaged weights; the text encoder still has the table of used rows."""
    data = Data()
    state = torch.load(work / "unet_checkpoint.pt")
    unet, text = UNet2DConditionModel(**UNET_CONFIG), new_text_encoder(len(data.used_ids))
    unet.load_state_dict(state["unet"]), text.load_state_dict(state["text"])
    with torch.no_grad():
        learned = [*unet.parameters(), *(p for p in text.parameters() if p.requires_grad)]
        for p, value in zip(learned, state["average"], strict=True):
            p.copy_(value)
    return unet.eval(), text.eval(), data


# ---- running ------------------------------------------------------------------------------------------------------

STAGES = {
    "text": (train_text, 700),
    "vae": (train_vae, 1900),
    "latents": (make_latents, 0),
    "unet": (train_unet, 9000),
    "decoder": (polish_decoder, 600),
}


def settle(seed: int, processes: int) -> None:
    """What every process of a run agrees on."""
    global SEED, WORLD
    SEED, WORLD = seed, processes


def worker(rank: int, stage: str, work: Path, steps: int, seed: int, processes: int) -> None:
    settle(seed, processes)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{work}/meet_{stage}", rank=rank, world_size=WORLD)
    STAGES[stage][0](work, steps)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--stage", choices=[*STAGES, "export"])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--processes", type=int, default=WORLD)
    parser.add_argument(
        "--vae-of", type=Path, metavar="FILE", help="take this checkpoint's VAE instead of training one"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to write the model (default: over the project's)"
    )
    args = parser.parse_args()
    settle(args.seed, args.processes)
    args.work.mkdir(parents=True, exist_ok=True)
    stages = [args.stage] if args.stage else [*STAGES, "export"]
    if args.vae_of:
        from lib_estimate.hosts import checkpoint

        torch.save(checkpoint.load(args.vae_of, torch.float32).vae.state_dict(), args.work / "vae.pt")
        stages = [stage for stage in stages if stage not in ("vae", "decoder")]
    for stage in stages:
        if stage == "export":
            from tests.shapes_sd import export

            export.export(args.work, args.out)
            continue
        (args.work / f"meet_{stage}").unlink(missing_ok=True)
        steps = args.steps if args.steps is not None else STAGES[stage][1]
        torch.multiprocessing.spawn(
            worker, (stage, args.work.resolve(), steps, args.seed, args.processes), nprocs=WORLD
        )


if __name__ == "__main__":
    main()
