"""One estimate from request to file. A newcomer starts reading here.

for progress in estimate(request, host, cancel): ...   # Phase, Note, StepReport, and last an Outcome
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib_estimate.errors import EstimateError
from lib_estimate.files import names, writing
from lib_estimate.files.embedding import FORMATS, Embedding, Vectors
from lib_estimate.hosts.base import Host, ModelInfo, Session
from lib_estimate.learn.count import starting_vectors
from lib_estimate.learn.learning import Run, learn
from lib_estimate.learn.objectives.cross_attention import InSentences
from lib_estimate.learn.registry import LOSSES
from lib_estimate.progress import Cancel, Interrupted, Note, Phase, StepReport
from lib_estimate.report.fidelity import Fidelity, measure, report_sentences
from lib_estimate.request import HOLE, EstimateRequest, Format, Use
from lib_estimate.target.recording import Material, materials_of
from lib_estimate.target.target import Target, build_target


@dataclass(frozen=True)
class Outcome:
    """What an estimate ended with."""

    path: Path
    embedding: Embedding
    fidelity: Fidelity
    losses: list[float]
    record: dict[str, Any]  # all of it as plain values, for JSON


Progress = Phase | Note | StepReport | Outcome


def estimate(request: EstimateRequest, host: Host, cancel: Cancel | None = None) -> Iterator[Progress]:
    """Runs one estimate. Raises EstimateError with a sentence for the user."""
    cancel, started = cancel or Cancel(), time.perf_counter()
    path = check_destination(request)
    with host.session() as session:
        path = _for_model(path, request, session.info)
        _check_size(request, session.info)
        yield from _notes(request, session)
        alone = build_target(request, session)
        materials = yield from materials_of(request, session, alone, cancel)
        start, counts = yield from starting_vectors(request, session, materials, cancel)
        run = yield from learn(request, session, materials, start, cancel)
        if cancel.wanted == "discard":
            raise Interrupted("Interrupted. Nothing was saved.")

        chosen = report_sentences(request, session)
        yield from _warnings(request, session, materials[0], run.best, chosen)
        facts = _facts(request, session.info, run, counts)
        try:
            fidelity = yield from _measured(session, alone, request, run.best, chosen)
        except BaseException:  # whatever stops the report, what was learnt must not be lost
            writing.save(Embedding(path.stem, run.best, facts), path, overwrite=request.overwrite)
            raise
        embedding = Embedding(path.stem, run.best, {**facts, **fidelity.figures()})
        writing.save(embedding, path, overwrite=request.overwrite)
        seconds = time.perf_counter() - started
        record = _record(request, path, session.info, run, counts, fidelity, seconds)
    yield Outcome(path, embedding, fidelity, run.losses, record)


def measured(embedding: Embedding, request: EstimateRequest, host: Host) -> Iterator[Phase | Fidelity]:
    """Measures an embedding against a prompt, as at the end of an estimate."""
    with host.session() as session:
        _check_size(request, session.info)
        vectors = fitting_vectors(embedding, session.info)
        chosen = report_sentences(request, session)
        yield (yield from _measured(session, build_target(request, session), request, vectors, chosen))


def check_destination(request: EstimateRequest) -> Path:
    """Where the file will be, before the model is known. Refuses bad requests and a name that is taken.

    A name is taken by a file of any format, in the folder or below it. Overwriting replaces that very file.
    """
    request.validate()
    folder, name = Path(request.out), names.check_name(request.name)
    suffix = Format.PT.value if request.format is Format.AUTO else request.format.value
    path = names.embedding_path(folder / request.subfolder, name, suffix)
    existing = path if path.exists() else names.find_existing(folder, name)
    if existing is None:
        return path
    if not request.overwrite:
        raise EstimateError(f"{existing} exists already. Choose another name, or allow overwriting (--overwrite).")
    if existing.suffix.lower().lstrip(".") not in FORMATS:
        raise EstimateError(f"{existing} has this name, and can't be overwritten: it is no .pt or .safetensors file.")
    return existing


def _for_model(path: Path, request: EstimateRequest, info: ModelInfo) -> Path:
    """The file's place once the model is known: SDXL's two kinds of vectors go into safetensors only."""
    pt = path.suffix.lower() == f".{Format.PT.value}"
    if len(info.widths) == 1 or not pt:
        return path
    if path.exists():
        raise EstimateError(f"{path} can't be overwritten by an SDXL embedding, which is never .pt: take another name.")
    if request.format is Format.PT:
        raise EstimateError("An SDXL embedding can't be saved as .pt. Choose safetensors, or auto, as the file format.")
    return path.with_suffix(f".{Format.SAFETENSORS.value}")


def _check_size(request: EstimateRequest, info: ModelInfo) -> None:
    for side in ("width", "height"):
        if getattr(request, side) % info.latent_scale:
            raise EstimateError(
                f"{side} is {getattr(request, side)}: it must be a multiple of {info.latent_scale} pixels."
            )


def _notes(request: EstimateRequest, session: Session) -> Iterator[Note]:
    shadow = names.shadowed_word(request.name, session.token_ids)
    texts = dict.fromkeys([request.text, request.prompt, request.negative, request.init, *request.sentence])
    notes = dict.fromkeys(note for text in texts if text for note in session.notes(text))
    for text in [*notes, *([shadow] if shadow else [])]:
        yield Note(text)


def fitting_vectors(embedding: Embedding, info: ModelInfo) -> Vectors:
    """The embedding's vectors under the model's own keys; EstimateError where their widths differ."""
    rows = list(embedding.vectors.values())
    widths = [r.shape[1] for r in rows]
    if widths != list(info.widths.values()):
        raise EstimateError(
            f"{embedding.name} holds vectors of width {', '.join(map(str, widths))}, the model {info.name} needs "
            f"{', '.join(map(str, info.widths.values()))}: it was made for another kind of model."
        )
    return {key: r.to(info.device) for key, r in zip(info.widths, rows, strict=True)}


def _warnings(
    request: EstimateRequest, session: Session, material: Material, vectors: Vectors, chosen: Sequence[str]
) -> Iterator[Note]:
    """Says before saving in which sentences the embedding would do worse than the prompt without its weights.

    By cross-attention outputs, without the U-Net: it catches what is bad, and sometimes warns of what is not.
    """
    if request.use is Use.WHOLE or material.target.single() is None or material.target.plain is None:
        return
    check = InSentences(session, material.target, material.queries, LOSSES["MSE"], request.text, ())
    check.FLOOR = 1e-4
    drawn = check.prepared([HOLE, *chosen], torch.Generator().manual_seed(request.seed))
    with torch.no_grad():
        shares = check.shares(vectors, drawn)[1:].tolist()
    bad = [sentence for sentence, share in zip(chosen, shares, strict=True) if share > 1]
    if bad:
        yield Note(
            f"In sentences such as {bad[0]!r} the prompt without its weights may come closer than the embedding."
        )


def _measured(
    session: Session, target: Target, request: EstimateRequest, vectors: Vectors, chosen: Sequence[str]
) -> Iterator[Phase]:
    for progress in measure(session, target, request, vectors, chosen):
        if isinstance(progress, Fidelity):
            return progress
        yield Phase(*progress)


def _facts(request: EstimateRequest, info: ModelInfo, run: Run, counts: dict[int, float]) -> dict[str, Any]:
    """What the file remembers of how it was made."""
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "settings": request.record(),
        "stages": run.stages,
        "seed": request.seed,
        "sd_checkpoint_name": info.name,
        "sd_checkpoint": info.hash,
        "step": len(run.losses),
        **({"errors_by_vectors": counts} if counts else {}),
    }


def _record(
    request: EstimateRequest,
    path: Path,
    info: ModelInfo,
    run: Run,
    counts: dict[int, float],
    fidelity: Fidelity,
    seconds: float,
) -> dict[str, Any]:
    return {
        "name": path.stem,
        "file": str(path),
        "format": path.suffix.lower().lstrip("."),
        "prompt": request.prompt,
        "negative": request.negative,
        "vectors": len(next(iter(run.best.values()))),
        "part": request.part.value,
        "use": request.use.value,
        "steps_run": len(run.losses),
        "stages": run.stages,
        "stopped": run.stopped,
        "seconds": seconds,
        "losses": run.losses,
        **fidelity.figures(),
        **({"errors_by_vectors": counts} if counts else {}),
        "seed": request.seed,
        "model": {"name": info.name, "hash": info.hash},
        "settings": request.record(),
    }
