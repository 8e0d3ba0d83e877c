from __future__ import annotations

import dataclasses

import pytest
import torch

from lib_estimate.errors import RequestError
from lib_estimate.files import writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.learn.initial import fitted, initial_vectors, pooled, random_rows
from lib_estimate.request import EstimateRequest, Start

KEY = "clip_l"


def start(session, short: EstimateRequest, **change) -> torch.Tensor:
    return initial_vectors(dataclasses.replace(short, **change), session)[KEY]


def rows_of(session, text: str) -> torch.Tensor:
    return session.parts.text_encoders[0].table.weight[session.token_ids(text)].float()


def test_blank_means_the_prompt_without_its_weights(session, short) -> None:
    assert torch.equal(start(session, short), rows_of(session, "a red circle"))


def test_the_initial_text_counts_the_vectors(session, short) -> None:
    assert torch.equal(start(session, short, init="blue star, large"), rows_of(session, "blue star, large"))


def test_text_is_cut_off_or_filled_with_zeros(session, short) -> None:
    assert torch.equal(start(session, short, vectors=2), rows_of(session, "a red"))
    longer = start(session, short, vectors=5, init="a red circle")
    assert torch.equal(longer[:3], rows_of(session, "a red circle"))
    assert not longer[3:].any()


def test_more_vectors_than_the_prompt_has_tokens_start_as_the_prompt(session, short) -> None:
    """Whatever their number, the model sees the prompt without its weights."""
    with torch.no_grad():
        wanted = session.encode([short.prompt], weighted=False).hidden
        longer = {KEY: start(session, short, vectors=6)}
        assert torch.allclose(session.encode([session.placeholder], longer).hidden, wanted, atol=1e-5)


def test_pooled_pieces_are_means() -> None:
    rows = torch.arange(10.0).view(5, 2)
    assert torch.equal(pooled(rows, 2), torch.stack([rows[:3].mean(0), rows[3:].mean(0)]))
    assert torch.equal(pooled(rows, 7), fitted(rows, 7))


def test_pooled_start_of_a_prompt(session, short) -> None:
    assert torch.allclose(
        start(session, short, vectors=1, start=Start.POOLED)[0], rows_of(session, "a red circle").mean(0)
    )


def test_random_rows_are_as_long_as_real_tokens(session, short) -> None:
    rows = start(session, short, vectors=60, start=Start.RANDOM)
    typical = session.table_norm()[KEY]
    assert 0.9 * typical < rows.norm(dim=1).mean() < 1.1 * typical
    assert torch.equal(rows, start(session, short, vectors=60, start=Start.RANDOM))
    assert not torch.equal(rows, start(session, short, vectors=60, start=Start.RANDOM, seed=1))


def test_random_rows_take_a_generator() -> None:
    a, b = (random_rows(3, 8, 0.4, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(a, b)


def test_an_embedding_in_the_text_stands_in_full(host, short, tmp_path) -> None:
    rows = torch.randn(3, host.parts.text_encoders[0].model.config.hidden_size)
    writing.save(Embedding("myword", {KEY: rows}, {}), tmp_path / "myword.pt")
    with_folder = StandaloneHost.__new__(StandaloneHost)
    with_folder.__dict__ |= host.__dict__ | {"embeddings": tmp_path}
    with with_folder.session() as session:
        vectors = start(session, short, init="a myword circle")
        assert torch.equal(vectors, torch.cat([rows_of(session, "a"), rows, rows_of(session, "circle")]))


def test_a_text_longer_than_a_chunk_is_cut_to_it(session, short) -> None:
    assert len(start(session, short, init="red " * 100)) == session.info.chunk_length


def test_nothing_to_count_is_said(session, short) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        start(session, dataclasses.replace(short, prompt="()"))
