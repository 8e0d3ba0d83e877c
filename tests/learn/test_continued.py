"""An existing embedding as the start of a run: whoever made it, however long it is, and what becomes of it."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from lib_estimate import job
from lib_estimate.errors import EmbeddingFileError, EstimateError, RequestError
from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.learn.continued import continued
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.progress import Note
from lib_estimate.request import AUTO_VECTORS, Part, Start, Use

KEY = "clip_l"


@pytest.fixture
def short(short):
    """On small latents."""
    return replace(short, width=64, height=64)


def rows(session, count: int = 3) -> torch.Tensor:
    """Vectors that are no words, of about their size."""
    noise = torch.randn(count, session.info.widths[KEY], generator=torch.Generator().manual_seed(4))
    return session.table_norm()[KEY] * noise / noise.norm(dim=1, keepdim=True)


def save(folder: Path, vectors: torch.Tensor, name: str = "old", **about) -> str:
    path = folder / f"{name}.pt"
    writing.save(Embedding(name, {KEY: vectors}, about), path, overwrite=True)
    return str(path)


def start(session, request, **change) -> torch.Tensor:
    return initial_vectors(replace(request, **change), session)[KEY]


def finished(host, request, **change) -> tuple[list[str], job.Outcome]:
    """The notes of a run, and its end."""
    *seen, outcome = job.estimate(replace(request, **change), host)
    return [p.text for p in seen if isinstance(p, Note)], outcome


# ---- files of anyone ----------------------------------------------------------------------------------------------


def webui_pt(path: Path, vectors: torch.Tensor) -> None:
    about = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "theirs", "step": 1500}
    torch.save(about, path.with_suffix(".pt"))


def old_container(path: Path, vectors: torch.Tensor) -> None:
    about = {"string_to_param": {"*": torch.nn.Parameter(vectors)}, "step": 1500}
    torch.save(about, path.with_suffix(".pt"), _use_new_zipfile_serialization=False)


def header_as_text(path: Path, vectors: torch.Tensor) -> None:
    save_file({"emb_params": vectors}, path.with_suffix(".safetensors"), {"step": "1500"})


def diffusers_dict(path: Path, vectors: torch.Tensor) -> None:
    torch.save({"<theirs>": vectors}, path.with_suffix(".bin"))


def card(path: Path, vectors: torch.Tensor) -> None:
    content = {"string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}, "name": "theirs", "step": 1500}
    about = PngImagePlugin.PngInfo()
    about.add_text("sd-ti-embedding", base64.b64encode(json.dumps(content).encode()))
    Image.new("RGB", (8, 8)).save(path.with_suffix(".png"), pnginfo=about)


@pytest.mark.parametrize(
    ("write", "steps"),
    [(webui_pt, 1500), (old_container, 1500), (header_as_text, 1500), (diffusers_dict, 0), (card, 1500)],
)
def test_files_made_elsewhere_are_the_start_with_their_steps(write, steps, session, short, tmp_path) -> None:
    vectors = rows(session, 4)
    write(tmp_path / "theirs", vectors)
    request = replace(short, continue_from="theirs")  # by its name in the folder of the embeddings
    assert torch.allclose(start(session, request), vectors, atol=1e-6)
    assert continued(request).steps == steps
    (file,) = tmp_path.iterdir()
    assert torch.equal(start(session, request, continue_from=str(file), out="elsewhere"), start(session, request))


@pytest.mark.parametrize("step", [-3, None, "many", [3], 10**15])
def test_a_step_count_that_is_none_counts_as_zero(step, session, short, tmp_path) -> None:
    save(tmp_path, rows(session), step=step)
    assert continued(replace(short, continue_from="old")).steps == 0


def test_a_mere_picture_of_that_name_is_not_taken_for_the_embedding(session, short, tmp_path) -> None:
    save(tmp_path, rows(session))
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png")
    assert torch.equal(start(session, short, continue_from="old"), rows(session))


def test_what_is_not_there_or_does_not_fit_is_said(host, session, short, tmp_path) -> None:
    with pytest.raises(EmbeddingFileError, match=r"no embedding 'nothing'.*of that name in"):
        job.check_destination(replace(short, continue_from="nothing"))
    wide = save(tmp_path, torch.ones(2, 7), "wide")
    with pytest.raises(EstimateError, match=r"width 7, the model .* made for another kind of model"):
        list(job.estimate(replace(short, continue_from=wide), host))
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(EmbeddingFileError, match="no embedding file"):
        job.check_destination(replace(short, continue_from=str(tmp_path / "notes.txt")))


@pytest.mark.parametrize("change", [{"init": "a blue star"}, {"start": Start.RANDOM}])
def test_two_starts_are_refused(change, short) -> None:
    with pytest.raises(RequestError, match="start"):
        replace(short, continue_from="old", **change).validate()


# ---- how many vectors ---------------------------------------------------------------------------------------------


def test_it_has_as_many_vectors_as_the_file_or_as_asked(session, short, tmp_path) -> None:
    request = replace(short, continue_from=save(tmp_path, rows(session, 5)))
    assert torch.equal(start(session, request), rows(session, 5))
    assert torch.equal(start(session, request, vectors=2), rows(session, 5)[:2])
    pooled = start(session, request, vectors=2, start=Start.POOLED)
    assert torch.allclose(pooled[0], rows(session, 5)[:3].mean(0))
    longer = save(tmp_path, rows(session, session.info.chunk_length + 3), "long")
    assert len(start(session, request, continue_from=longer)) == session.info.chunk_length


def test_what_fills_it_up_changes_nothing(session, short, tmp_path) -> None:
    request = replace(short, continue_from=save(tmp_path, rows(session)))
    longer = start(session, request, vectors=7)
    assert torch.equal(longer[:3], rows(session))
    with torch.no_grad():
        wanted = session.encode([session.placeholder], {KEY: rows(session)}).hidden
        assert torch.allclose(session.encode([session.placeholder], {KEY: longer}).hidden, wanted, atol=1e-5)


def test_cutting_it_is_said(host, session, short, tmp_path) -> None:
    path = save(tmp_path, rows(session, 5))
    notes, outcome = finished(host, short, continue_from=path, vectors=2, steps=1)
    assert "old holds 5 vectors: they are cut off after the 2 wanted." in notes
    assert len(outcome.embedding.vectors[KEY]) == 2


def test_the_number_can_be_found_by_trial(host, session, short, tmp_path) -> None:
    path = save(tmp_path, session.token_vectors("a red circle")[KEY])
    request = replace(short, continue_from=path, vectors=AUTO_VECTORS, tolerance=1.0, part=Part.CROSS_ATTENTION)
    notes, outcome = finished(host, request)
    assert any("1 vectors are used" in note for note in notes)
    assert len(outcome.embedding.vectors[KEY]) == 1


# ---- a whole run --------------------------------------------------------------------------------------------------


def test_it_goes_on_where_the_file_was_and_counts_on(host, short, tmp_path) -> None:
    request = replace(short, part=Part.CROSS_ATTENTION, steps=8)
    first = finished(host, request)[1]
    notes, more = finished(host, request, continue_from="short", overwrite=True)  # the file itself, replaced
    anew = finished(host, request, name="anew")[1]
    assert more.losses[0] < 0.5 * anew.losses[0]
    assert more.fidelity.error <= first.fidelity.error
    steps = len(first.losses), len(more.losses)
    assert reading.load(tmp_path / "short.pt").metadata["step"] == more.record["step"] == sum(steps)
    known = {"name": "short", "step": steps[0], "vectors": 3}
    assert more.embedding.metadata["continued_from"] == more.record["continued_from"] == known
    assert "continued_from" not in anew.record


def test_a_run_that_goes_astray_keeps_the_file_and_says_so(host, session, short, tmp_path) -> None:
    """Steps that throw the vectors far away, and a check that likes it."""
    good = finished(host, short, part=Part.CROSS_ATTENTION, steps=15)[1]
    assert good.fidelity.recovered > 0.1
    far = {"part": Part.CROSS_ATTENTION, "optimizer": "SGD", "learning_rate": "1e6", "steps": 1, "name": "far"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib_estimate.learn.learning.cross_attention_validator", lambda *_: negated_size)
        notes, outcome = finished(host, short, continue_from="short", **far)
    assert job.START_KEPT.format(name="short") in notes
    assert torch.equal(outcome.embedding.vectors[KEY], good.embedding.vectors[KEY])
    assert outcome.fidelity.error == pytest.approx(good.fidelity.error)
    assert outcome.fidelity.recovered == pytest.approx(good.fidelity.recovered)


def negated_size(vectors) -> float:
    return -vectors[KEY].square().sum().item()


def test_a_file_that_says_what_the_prompt_says_is_not_learnt_on(host, session, short, tmp_path) -> None:
    tokens = session.token_vectors("a red circle")[KEY]
    request = replace(short, prompt="a red circle", use=Use.ANYWHERE, continue_from=save(tmp_path, tokens, step=7))
    notes, outcome = finished(host, request)
    assert any(job.SAYS_THE_SAME in note for note in notes)
    assert torch.equal(outcome.embedding.vectors[KEY], tokens)
    assert outcome.embedding.metadata["step"] == 7


def test_a_file_that_agrees_alone_only_is_learnt_on_for_use_in_sentences(host, session, short, tmp_path) -> None:
    """Filled up it is exact alone, but moves the words after it."""
    tokens = torch.cat([session.token_vectors("a red circle")[KEY], session.end_vectors()[KEY]])
    path = save(tmp_path, tokens)
    request = replace(short, prompt="a red circle", continue_from=path, steps=1, part=Part.CROSS_ATTENTION)
    assert any(job.SAYS_THE_SAME in note for note in finished(host, request)[0])
    notes, outcome = finished(host, request, use=Use.ANYWHERE, overwrite=True)
    assert not any(job.SAYS_THE_SAME in note for note in notes)
    assert len(outcome.losses) == 1


def test_where_the_prompts_own_tokens_are_exact_that_is_said(host, session, short, tmp_path) -> None:
    path = save(tmp_path, rows(session))
    notes, outcome = finished(host, short, prompt="a red circle", continue_from=path)
    assert job.LEAVE_IT_OUT in notes
    assert outcome.losses  # it is learnt on all the same, as asked
    assert not torch.equal(outcome.embedding.vectors[KEY], session.token_vectors("a red circle")[KEY])
