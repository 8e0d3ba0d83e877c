"""Stable Diffusion 2 and XL on the standalone host: against diffusers' own pipelines, and through a whole estimate."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lib_estimate import job
from lib_estimate.errors import EstimateError, ModelError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.base import Conditioning, StepConditioning
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.learn.objectives.cross_attention import CrossAttention, InSentences
from lib_estimate.learn.objectives.hidden_state import HiddenState
from lib_estimate.learn.registry import LOSSES
from lib_estimate.measuring import measured
from lib_estimate.request import HOLE, EstimateRequest, Format, ModelOptions, Part, Start
from tests.conftest import record
from tests.small_models import FIRST, SECOND, SIDE, SmallModel, small_model

FAMILIES = (("sd2", "epsilon"), ("sd2", "v_prediction"), ("sdxl", "epsilon"))
STEPS = 6
CLEANED = Path(__file__).parents[1] / "data" / "cleaned_golden.json"


def loaded(path: Path, **options) -> StandaloneHost:
    return StandaloneHost(ModelOptions(model=str(path), device="cpu", **options))


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def small(request) -> SmallModel:
    return small_model(*request.param)


@pytest.fixture(scope="module")
def family_host(small, tmp_path_factory) -> StandaloneHost:
    folder = tmp_path_factory.mktemp("family") / "model"
    small.pipeline().save_pretrained(folder)
    return loaded(folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory) -> StandaloneHost:
    folder = tmp_path_factory.mktemp("xl") / "model"
    small_model("sdxl").pipeline().save_pretrained(folder)
    return loaded(folder)


@pytest.fixture
def brief(tmp_path) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (red:1.6) circle", name="brieftest", out=str(tmp_path), steps=6, sampling_steps=4, images=0,
        sentence=("a photo of {}",),
    )  # fmt: skip


def noise(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


# ---- the model is read as its makers do ---------------------------------------------------------------------------


@pytest.mark.parametrize("negative", ["", "a blue star"])
def test_a_generation_is_diffusers_own(small, family_host, negative: str) -> None:
    """Text encoders, layers, padding, pooled vector, sizes, zeros for SDXL's empty negative prompt, v or noise."""
    with family_host.session() as session:
        with torch.no_grad():
            positive = session.encode(["a red circle"])
            given = StepConditioning(((1.0, positive),), session.encode([negative], negative=True))
        *_, path = session.sample(noise(), [given] * STEPS, 5.0)
    size = SIDE * session.info.latent_scale
    wanted = small.pipeline()(
        "a red circle", negative_prompt=negative or None, num_inference_steps=STEPS, guidance_scale=5.0,
        latents=noise(), output_type="latent", height=size, width=size,
    ).images  # fmt: skip
    assert torch.allclose(path.final, wanted, atol=2e-3 * wanted.abs().max().item())


def test_a_single_file_is_the_same_model(small, family_host, tmp_path) -> None:
    other = loaded(small.single_file(tmp_path / "one.safetensors"))
    assert other.parts.prediction == family_host.parts.prediction
    assert other.parts.default_size == family_host.parts.default_size
    x, t = noise(2), torch.tensor([100, 900])
    said = []
    for host in (family_host, other):
        with host.session() as session, torch.no_grad():
            conditioning = session.encode(["a (red:1.5) circle", "star"])
            said.append((conditioning, session.predict_noise(x, t, conditioning)))
    (a, eps), (b, other_eps) = said
    assert torch.allclose(a.hidden, b.hidden, atol=1e-4)
    assert a.pooled is None or torch.allclose(a.pooled, b.pooled, atol=1e-4)
    assert torch.allclose(eps, other_eps, atol=1e-3)


def test_a_single_file_without_yaml_is_tried_for_what_it_predicts(tmp_path) -> None:
    """Random weights predict nothing, so only that the file is asked; the .yaml's word is taken where there is one. Of
    one family: a network of full size is made for it."""
    small = small_model("sd2", "v_prediction")
    path = small.single_file(tmp_path / "one.safetensors")
    path.with_suffix(".yaml").unlink()
    with pytest.raises(ModelError):  # the published layout is the full-sized one
        loaded(path)


def test_sdxl_reads_the_layer_before_the_last_and_clip_skip_moves_it_on_request(xl) -> None:
    def hidden(**options) -> torch.Tensor:
        other = StandaloneHost.__new__(StandaloneHost)
        other.__dict__ |= xl.__dict__ | {"options": ModelOptions(**options)}
        with other.session() as session, torch.no_grad():
            return session.encode(["a red circle"]).hidden

    usual, skipped = hidden(), hidden(clip_skip=3)
    moved = hidden(clip_skip=3, sdxl_clip_l_skip=True)
    assert torch.equal(usual, skipped)
    assert not torch.equal(usual[..., :FIRST], moved[..., :FIRST])
    assert torch.equal(usual[..., FIRST:], moved[..., FIRST:])


def test_each_encoder_of_sdxl_reads_a_text_as_a_webui_has_it_read(xl) -> None:
    golden = json.loads(CLEANED.read_text(encoding="utf-8"))["texts"]
    with xl.session() as session, torch.no_grad():
        tables = {encoder.key: encoder.table.weight for encoder in session.parts.text_encoders}
        for row in golden:
            read = {"clip_l": row["transformers"], "clip_g": row["open_clip"]}
            rows = session.token_vectors(attention_free(row["text"]))
            assert all(torch.equal(rows[key], tables[key][ids].float()) for key, ids in read.items()), row["text"]
        # Of different lengths for the two, one of them in a chunk more.
        long = session.encode([f"{'x ' * 70} a &lt;b&gt;bold&lt;/b&gt; < circle"])
        assert long.hidden.shape[1] == 2 * (session.info.chunk_length + 2)


def attention_free(text: str) -> str:
    """With brackets that are text."""
    return re.sub(r"([()\[\]])", r"\\\1", text)


def test_weights_leave_the_pooled_vector_alone_and_the_first_chunk_gives_it(xl) -> None:
    with xl.session() as session, torch.no_grad():
        plain, weighted = session.encode(["a red circle"]), session.encode(["a (red:1.6) circle"])
        long = session.encode(["a red circle BREAK a star"])
    assert torch.equal(plain.pooled, weighted.pooled)
    assert not torch.equal(plain.hidden, weighted.hidden)
    assert torch.allclose(long.pooled, plain.pooled, atol=1e-5)


def test_sizes_reach_sdxl(xl) -> None:
    with xl.session() as session, torch.no_grad():
        conditioning = session.encode(["a red circle"])
        wide = torch.cat([noise(), noise()], dim=3)
        t = torch.tensor([500])
        sizes = session.added(wide, conditioning.pooled)["added_cond_kwargs"]["time_ids"][0].tolist()
        scale = session.info.latent_scale
        assert sizes == [SIDE * scale, 2 * SIDE * scale, 0, 0, SIDE * scale, 2 * SIDE * scale]
        usual = session.predict_noise(noise(), t, conditioning)
        session.info = replace(session.info, latent_scale=2 * scale)
        assert not torch.equal(session.predict_noise(noise(), t, conditioning), usual)


# ---- estimates ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", list(Part))
def test_every_part_learns(family_host, brief, part: Part) -> None:
    before = [p.detach().clone() for network in family_host.parts.networks() for p in network.parameters()]
    *_, outcome = job.estimate(replace(brief, part=part, start=Start.RANDOM), family_host)
    after = [p for network in family_host.parts.networks() for p in network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert min(outcome.losses[1:]) < outcome.losses[0]
    widths = {key: rows.shape[1] for key, rows in outcome.embedding.vectors.items()}
    assert widths == ({"clip_l": FIRST, "clip_g": SECOND} if len(widths) > 1 else {"clip_h": SECOND})
    assert outcome.path.suffix == (".safetensors" if len(widths) > 1 else ".pt")


def test_diffusers_reads_both_of_sdxls_tensors(xl, brief) -> None:
    *_, outcome = job.estimate(replace(brief, part=Part.TRANSFORMER), xl)
    model, tensors = small_model("sdxl"), load_file(outcome.path)
    pipeline = model.pipeline()
    for key, text, tokenizer in (
        ("clip_l", pipeline.text_encoder, pipeline.tokenizer), ("clip_g", pipeline.text_encoder_2, pipeline.tokenizer_2)
    ):  # fmt: skip
        pipeline.load_textual_inversion(tensors[key], token="brieftest", text_encoder=text, tokenizer=tokenizer)
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("brieftest"))
        assert torch.allclose(text.get_input_embeddings().weight[ids[0]], tensors[key][0], atol=1e-6)


def test_the_pooled_vector_is_part_of_every_loss(xl, brief) -> None:
    """Off by the pooled vector alone, each loss is above zero; its gradient reaches both encoders' vectors."""
    with xl.session() as session:
        material = record(session, replace(brief, trajectories=1))
        target, mse = material.target, LOSSES["MSE"]
        rows = {k: v.requires_grad_(True) for k, v in session.token_vectors("a red circle").items()}
        right, encode = target.single(), session.encode
        sentences = InSentences(session, target, material.queries, mse, brief.prompt, ())
        drawn = sentences.prepared([HOLE], torch.Generator().manual_seed(0))
        objectives = {
            "transformer": (HiddenState(session, target, mse), None),
            "cross-attention": (CrossAttention(session, target, material.queries, mse), None),
            "in sentences": (sentences, drawn),
        }
        for name, (objective, given) in objectives.items():
            for pooled, off in ((right.pooled, False), (right.pooled + 1, True)):
                session.encode = lambda *_, pooled=pooled, **__: Conditioning(right.hidden, pooled)
                loss = objective.loss(rows, given).item()
                assert (loss > 1e-3) is off, (name, loss)
            session.encode = encode
            gradients = torch.autograd.grad(objective.loss(rows, given), list(rows.values()))
            assert all(g.abs().max() > 0 for g in gradients), name
            # without its second encoder's way to the pooled vector and the states, its vectors get none
            session.encode = lambda *a, **k: Conditioning(
                torch.cat([encode(*a, **k).hidden[..., :FIRST], right.hidden[..., FIRST:]], 2), right.pooled
            )
            _, cut = torch.autograd.grad(objective.loss(rows, given), list(rows.values()), allow_unused=True)
            assert cut is None or not cut.any(), name
            session.encode = encode


# ---- wrong combinations -------------------------------------------------------------------------------------------


def test_an_embedding_of_another_family_is_said_before_the_run(xl, brief, tmp_path) -> None:
    writing.save(Embedding("oldneg", {"clip_l": torch.zeros(2, FIRST)}, {}), tmp_path / "oldneg.pt")
    xl.embeddings = tmp_path
    try:
        for change in ({"prompt": "a (red:1.6) oldneg circle"}, {"negative": "oldneg"}, {"init": "oldneg circle"}):
            first = next(iter(job.estimate(replace(brief, **change), xl)))
            assert "oldneg" in first.text, change
            assert f"width {FIRST}" in first.text, change
    finally:
        xl.embeddings = None


def test_an_embedding_of_another_family_can_not_be_measured(xl, brief) -> None:
    other = Embedding("other", {"clip_l": torch.zeros(2, FIRST)}, {})
    with pytest.raises(EstimateError, match="another kind of model"):
        list(measured(other, brief, xl))


def test_a_refiner_is_refused(tmp_path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"text_encoder": [None, None]}))
    for name in ("text_encoder_2", "unet", "vae"):
        (tmp_path / name).mkdir()
    with pytest.raises(ModelError, match="refiner"):
        loaded(tmp_path)


# ---- more channels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mask"), [(9, True), (8, False)])
def test_other_channels_are_filled(channels: int, mask: bool, tmp_path) -> None:
    """Inpainting takes a mask and a picture's latents, instruct-pix2pix a picture's latents."""
    small_model("sd2", in_channels=channels).pipeline().save_pretrained(tmp_path / "model")
    host, seen = loaded(tmp_path / "model"), []
    host.parts.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with host.session() as session, torch.no_grad():
        assert session.info.latent_channels == 4
        session.predict_noise(noise(2), torch.tensor([100, 900]), session.encode(["a red circle"]))
        vae = host.parts.vae
        size = SIDE * session.info.latent_scale
        grey = vae.encode(torch.zeros(1, 3, size, size)).latent_dist.mode() * vae.config.scaling_factor
    (x,) = seen
    assert torch.equal(x[:, :4], noise(2))
    if mask:
        assert (x[:, 4] == 1).all()
        assert torch.allclose(x[:, 5:], grey.expand(2, -1, -1, -1), atol=1e-5)
    else:
        assert not x[:, 4:].any()


def test_other_numbers_of_channels_are_refused(tmp_path) -> None:
    small_model("sd2", in_channels=5).pipeline().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="channels"):
        loaded(tmp_path / "model")


def test_an_inpainting_file_is_known_by_its_weights(tmp_path) -> None:
    """Its .yaml is often missing or the base model's."""
    path = small_model("sd2", in_channels=9).single_file(tmp_path / "one.safetensors")
    assert loaded(path).parts.unet.config.in_channels == 9


def test_sdxls_files_are_safetensors(brief, xl, tmp_path) -> None:
    """Without being told to; as .pt it is refused before anything is learnt."""
    with pytest.raises(EstimateError, match="safetensors"):
        next(job.estimate(replace(brief, format=Format.PT), xl))
    *_, made = job.estimate(replace(brief, steps=1), xl)
    assert made.path.name == "brieftest.safetensors"
    (tmp_path / "older.pt").write_bytes(b"mine")
    with pytest.raises(EstimateError, match="another name"):
        next(job.estimate(replace(brief, name="older", overwrite=True), xl))
    assert (tmp_path / "older.pt").read_bytes() == b"mine"
