"""Where the vectors start: from a text's own token vectors or an embedding's, pooled pieces of them, or noise of the
same size."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import Session, Vectors
from lib_estimate.learn.continued import continued, fitting_vectors
from lib_estimate.request import INIT_TEXT, EstimateRequest, Start


def initial_vectors(request: EstimateRequest, session: Session) -> Vectors:
    """The vectors `{encoder: [N, width]}` an estimate starts from, float32.

    Raises RequestError where N doesn't fit into one chunk of the model's.
    """
    origin = continued(request)
    if origin is None:
        rows = session.token_vectors(start_text(request, session))
    else:
        rows = fitting_vectors(origin.embedding, session.info)
    available = next(iter(rows.values())).shape[0]
    count = wanted_count(request, available, session.info.chunk_length)
    if request.start is Start.RANDOM:
        generator = torch.Generator().manual_seed(request.seed)
        lengths = session.table_norm()
        return {key: random_rows(count, r.shape[1], lengths[key], generator).to(r.device) for key, r in rows.items()}
    # Beyond a given text come zeros. Beyond the prompt itself, or an embedding, comes what fills up a prompt anyway: so
    # the start is the prompt without its weights, or that embedding, however many vectors there are.
    beyond = {} if request.init.strip() else session.end_vectors()
    fill = pooled if request.start is Start.POOLED else fitted
    return {key: fill(r, count, beyond.get(key)) for key, r in rows.items()}


def start_text(request: EstimateRequest, session: Session) -> str:
    """The initial text; blank means the prompt itself, as it stands at the first sampling step."""
    if request.init.strip():
        return request.init
    parts = session.read(request.text, request.sampling_steps, negative=request.text is not request.prompt)
    return " ".join(part.text_at(0) for part in parts)


def wanted_count(request: EstimateRequest, available: int, chunk_length: int) -> int:
    """N: as asked, or one vector per token of the initial text, as far as one chunk goes."""
    if request.vectors == INIT_TEXT:
        if not available:
            raise RequestError("The initial text has no tokens to count: type a text, or set vectors to a number.")
        return min(available, chunk_length)
    if request.vectors > chunk_length:
        raise RequestError(f"vectors is {request.vectors}: this model's prompts hold {chunk_length} in one piece.")
    return int(request.vectors)


def fitted(rows: Tensor, count: int, beyond: Tensor | None = None) -> Tensor:
    """rows `[n, width]` -> `[count, width]`: cut off, or filled up with `beyond` `[1, width]`, zeros where None."""
    out = rows.new_zeros(count, rows.shape[1])
    if beyond is not None:
        out += beyond
    kept = min(count, len(rows))
    out[:kept] = rows[:kept]
    return out


def pooled(rows: Tensor, count: int, beyond: Tensor | None = None) -> Tensor:
    """rows `[n, width]` -> `[count, width]`: n tokens in `count` pieces, each the mean of its tokens.

    With fewer tokens than vectors every token is a piece of its own and the rest is `beyond`, as in `fitted`.
    """
    if len(rows) <= count:
        return fitted(rows, count, beyond)
    return torch.stack([piece.mean(0) for piece in torch.tensor_split(rows, count)])


def random_rows(count: int, width: int, length: float, generator: torch.Generator) -> Tensor:
    """Gaussian rows `[count, width]` of about the given length, that of a real token's vector."""
    return torch.randn(count, width, generator=generator) * (length / width**0.5)
