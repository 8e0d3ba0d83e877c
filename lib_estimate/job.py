"""One estimate from request to file. A newcomer starts reading here.

for progress in estimate(request, host, cancel): ...   # Phase, Note, StepReport, and last an Outcome
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from lib_estimate.costs import case_of, of_run
from lib_estimate.errors import EstimateError, ReportFailed
from lib_estimate.files import names
from lib_estimate.files.claim import claimed
from lib_estimate.files.destination import free_path
from lib_estimate.files.embedding import Embedding, Vectors
from lib_estimate.files.rescue import save_all
from lib_estimate.hosts.base import Conditioning, Host, ModelInfo, Session
from lib_estimate.hosts.several import sessions_of
from lib_estimate.learn.continued import Continued, continued
from lib_estimate.learn.count import starting_vectors
from lib_estimate.learn.initial import initial_vectors, wanted_count
from lib_estimate.learn.learning import Run, come_to, learn
from lib_estimate.learn.needs import Case, shared, shortage, shortage_said
from lib_estimate.learn.resume import RunState
from lib_estimate.progress import Cancel, Interrupted, Note, Phase, Planned, StepReport
from lib_estimate.report.against_start import Kept, measure_against
from lib_estimate.report.checkpoints import court_of, exact_on
from lib_estimate.report.fidelity import Court, Fidelity, first_good, report_sentences
from lib_estimate.report.in_words import leaving_out
from lib_estimate.request import AUTO_VECTORS, EstimateRequest, Format, Offload, Start, Use, forwards_of_a_picture
from lib_estimate.request import Target as Which
from lib_estimate.target.extra_networks import check_tags
from lib_estimate.target.recording import Material, materials_of
from lib_estimate.target.target import Target, own_text, targets_on
from lib_estimate.target.texts import put_together, texts_of


@dataclass(frozen=True)
class Outcome:
    """What an estimate ended with."""

    path: Path
    embedding: Embedding
    fidelity: Fidelity
    losses: list[float]
    record: dict[str, Any]  # all of it as plain values, for JSON
    written: dict[str, str]  # what to write now as the "prompt" and the "negative prompt", as far as it has changed
    others: tuple[Path, ...] = ()  # where several words were made: the files of those after the first

    @property
    def title(self) -> str:
        """What the result is called in words and pictures: the name, or all that is to be written."""
        return " / ".join(self.written.values())


Progress = Planned | Phase | Note | StepReport | Outcome

WENT_BACK = "As learnt, the vectors did worse somewhere than {}, so they go {:.0f}% of the way that was learnt."
STAYED = "Nothing learnt did better everywhere than {}: the embedding is the prompt's words alone."
OWN_TOKENS = "The prompt has no weights, so its own tokens are exact"
SAYS_THE_SAME = "The embedding that is continued says exactly what the prompt says"
START_KEPT = "Nothing learnt did as well everywhere as {name} did before, so its vectors are kept as they were."
START_BACK = (
    "As learnt, the vectors did worse somewhere than {name}, or than {leaving_out}, so they go {share:.0f}% of the way "
    "that was learnt."
)
FILE_POOR = (
    "{name} itself does worse somewhere than {leaving_out}, so what was learnt is held against the prompt's words "
    "alone instead."
)
TOO_MUCH = (
    "The prompt is {texts} texts, at different steps or composed with AND, and one word holds them only so far "
    "({why}). A word for each of them holds them all: --stages makes them, to be written as {paste}."
)
TOO_FAR = 0.05  # error from which on that is said
LEAVE_IT_OUT = "The prompt has no weights, so its own tokens would be exact: nothing has to be continued for it."
LORA_AS_WHOLE = "A LoRA works on the whole picture, so the embedding is made to be the whole prompt."
BACK = (0.75, 0.5, 0.25, 0.0)  # shares of the way from the start, tried where the whole way is worse than the start


class Bill:
    """What the parts of a job cost, in U-Net forward-equivalents: one latent forward 1, with gradient 3."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        self.sessions, self.forwards = sessions, {"recording": 0, "learning": 0, "report": 0}

    def charge(self, part: str) -> None:
        """Puts everything that is on no other part's bill onto this one's."""
        self.forwards[part] += self.spent() - sum(self.forwards.values())

    def spent(self) -> int:
        return sum(session.forwards for session in self.sessions)


def estimate(request: EstimateRequest, host: Host, cancel: Cancel | None = None) -> Iterator[Progress]:
    """Runs one estimate. Raises EstimateError with a sentence for the user.

    A host of several checkpoints makes one embedding for all of them; the first one's tokens are the start.
    """
    cancel, started = cancel or Cancel(), time.perf_counter()
    origin = continued(request)
    check_destination(request)
    if request.take_over_lora and request.use is Use.ANYWHERE:
        request = replace(request, use=Use.WHOLE)
        yield Note(LORA_AS_WHOLE)
    claim = claimed(Path(request.out), request.name)
    with claim, sessions_of(host, tags=request.take_over_lora) as sessions, shortage_said(request, sessions):
        infos = [session.info for session in sessions]
        path = destination(request, infos)
        yield from notes_on(request, sessions[0], origin)
        check_tags(request, sessions[0])
        alone, bill = targets_on(request, sessions), Bill(sessions)
        with RunState(request, infos, alone[0].wanted(0)[0][1]).kept(cancel) as state:
            yield from state.notes()
            run, start, counts = yield from learnt(request, sessions, alone, cancel, bill, state=state)
            chosen = report_sentences(request) if run.stages else ()
            if cancel.wanted == "discard":
                raise Interrupted("Interrupted. Nothing was saved.")

            facts = facts_of(request, infos, run, counts, origin)

            def save(more: dict[str, Any]) -> Embedding:
                made = Embedding(path.stem, run.best, {**facts, **more})
                save_all([(made, path)], overwrite=request.overwrite)
                state.remove()
                return made

            try:
                fidelity = yield from _report(request, sessions, alone, run, start, chosen, origin)
            except BaseException as error:  # whatever stops the report, what was learnt must not be lost
                save({})
                raise saved_anyway(error, [path], request, sessions) from error
            bill.charge("report")
            embedding = save({**fidelity.figures(), "forwards": bill.forwards})
        seconds = time.perf_counter() - started
        record = record_of(request, path, infos[0], run, counts, fidelity, seconds) | {"forwards": bill.forwards}
        record |= {} if origin is None else origin.facts() | {"step": facts["step"]}
    side = "negative prompt" if alone[0].negative else "prompt"
    yield Outcome(path, embedding, fidelity, run.losses, record, {side: path.stem})


def learnt(
    request: EstimateRequest,
    sessions: Sequence[Session],
    alone: Sequence[Target],
    cancel: Cancel,
    bill: Bill,
    materials: list[Material] | None = None,
    state: RunState | None = None,
    one_of_several: bool = False,
) -> Iterator[Progress]:
    """The Run of one word, the vectors it started from, and the errors by number of vectors where that was tried.

    materials: what was recorded of it already. state: where it is kept, and from where it may go on. one_of_several:
    what it will cost is said already, with the others.
    """
    origin = continued(request)
    session = sessions[0]
    if own_tokens_do(request, sessions, alone):
        yield Note(f"{OWN_TOKENS if origin is None else SAYS_THE_SAME}: there is nothing to learn.")
        start = initial_vectors(request, session)
        return Run(start, [], [], "the start is exact"), start, {}
    if origin is not None and own_tokens_do(replace(request, continue_from=""), sessions, alone):
        yield Note(LEAVE_IT_OUT)
    saved = None if state is None else state.start_on(session.info.device)
    if saved is not None and state.saved.finished:
        yield Planned(tuple(of_run(request, case_of(request, sessions, alone[0]))), bill.spent)
        return come_to(state, saved[0])[0], *saved
    if materials is None:
        recomputed = yield from arrange(request, sessions, alone[0])
        if not one_of_several:
            case = case_of(request, sessions, alone[0], recomputed=recomputed)
            yield Planned(tuple(of_run(request, case)), bill.spent)
        materials = []
        for each, target in zip(sessions, alone, strict=True):
            materials += yield from materials_of(request, each, target, cancel)
            if len(sessions) > 1:
                each.place()  # the next one needs the room
        bill.charge("recording")
    start, counts = saved or (yield from starting_vectors(request, session, materials, cancel))
    if state is not None and saved is None:
        state.begin(start, counts)
    run = yield from learn(request, session, materials, start, cancel, state)
    bill.charge("learning")
    return run, start, counts


def saved_anyway(
    error: BaseException, paths: Sequence[Path], request: EstimateRequest, sessions: Sequence[Session]
) -> BaseException:
    """What to raise where something stopped a report: it says that the vectors are there."""
    if not isinstance(error, Exception):
        return error
    why = str(error) if isinstance(error, EstimateError) else f"Unexpected {type(error).__name__}: {error}"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        why = shortage(request, sessions, error)
    saved = f"The embedding is saved ({', '.join(map(str, paths))}), but could not be measured."
    return ReportFailed(f"{saved} {why}")


def cost_sentence(forwards: dict[str, int], sampling_steps: int, cfg_scale: float) -> str:
    """What an estimate cost, in pictures of as many steps at this CFG scale."""
    one = forwards_of_a_picture(sampling_steps, cfg_scale)
    pictures = {part: count / one for part, count in forwards.items()}
    learning = pictures["recording"] + pictures["learning"]
    return (
        f"It cost as much as {sum(pictures.values()):.0f} pictures: {learning:.0f} to learn, {pictures['report']:.0f} "
        f"to report ({sum(forwards.values())} U-Net forwards)."
    )


def check_destination(request: EstimateRequest) -> Path:
    """Where the file will be, before the model is known. Refuses bad requests, a file to continue that can't be read,
    a name that is taken, and a place where no file can be written."""
    continued(request.validate())
    return free_path(request)


def destination(request: EstimateRequest, infos: Sequence[ModelInfo]) -> Path:
    """Where the file will be, and refuses what doesn't fit the model: SDXL's two kinds of vectors go into safetensors
    only."""
    path = check_destination(request)
    check_size(request, infos)
    pt = path.suffix.lower() == f".{Format.PT.value}"
    if len(infos[0].widths) == 1 or not pt:
        return path
    if path.exists():
        raise EstimateError(f"{path} can't be overwritten by an SDXL embedding, which is never .pt: take another name.")
    if request.format is Format.PT:
        raise EstimateError("An SDXL embedding can't be saved as .pt. Choose safetensors, or auto, as the file format.")
    return path.with_suffix(f".{Format.SAFETENSORS.value}")


def check_size(request: EstimateRequest, infos: Sequence[ModelInfo]) -> None:
    for side, info in product(("width", "height"), infos):
        if getattr(request, side) % info.latent_scale:
            raise EstimateError(
                f"{side} is {getattr(request, side)}: it must be a multiple of {info.latent_scale} pixels."
            )


def notes_on(request: EstimateRequest, session: Session, origin: Continued | None) -> Iterator[Note]:
    shadow = names.shadowed_word(request.name, session.token_ids)
    prompt = session.tags(request.prompt)[0] if request.take_over_lora else request.prompt
    texts = dict.fromkeys([prompt, request.negative, request.init, *request.sentence])
    notes = dict.fromkeys(note for text in texts if text for note in session.notes(text))
    for text in [*notes, *([shadow] if shadow else [])]:
        yield Note(text)
    if origin is not None and request.vectors != AUTO_VECTORS:
        count = wanted_count(request, origin.vectors, session.info.chunk_length)
        how = "pooled into" if request.start is Start.POOLED else "cut off after"
        if count < origin.vectors:
            yield Note(f"{origin.embedding.name} holds {origin.vectors} vectors: they are {how} the {count} wanted.")


def arrange(request: EstimateRequest, sessions: Sequence[Session], alone: Target) -> Iterator[Note]:
    """Shares out the device's memory, before anything needs much of it. Whether activations are computed again."""
    steady, room = alone.single() is not None, shared([session.room() for session in sessions])
    way = Case(request, sessions[0].info, room, alone.composed(), steady).way()
    for session in sessions:
        session.offload(way.mode)
        if way.recompute:
            session.save_memory()
    if way.note:
        yield Note(way.note)
    return way.recompute or way.mode is Offload.BLOCKS


def own_tokens_do(request: EstimateRequest, sessions: Sequence[Session], alone: Sequence[Target]) -> bool:
    """Whether the vectors to start from say exactly what the prompt does, wherever the word is meant to stand; on every
    checkpoint."""
    wanted = [target.single() for target in alone]
    if None in wanted or any(target.plain is not None for target in alone) or request.vectors == AUTO_VECTORS:
        return False
    start = initial_vectors(request, sessions[0])
    tokens = sessions[0].token_vectors(own_text(request, sessions[0]))
    # More vectors move the words after them, and others may agree with the tokens alone but not among words.
    if request.use is not Use.WHOLE and any(not torch.equal(start[key], rows) for key, rows in tokens.items()):
        return False
    with torch.no_grad():
        said = [target.embed(session, start) for session, target in zip(sessions, alone, strict=True)]
    return all(map(Conditioning.close_to, said, wanted))


def _report(
    request: EstimateRequest,
    sessions: Sequence[Session],
    alone: Sequence[Target],
    run: Run,
    start: Vectors,
    chosen: Sequence[str],
    origin: Continued | None,
) -> Iterator[Phase | Note]:
    """The Fidelity of what was learnt. Where the start, or leaving the weights out, does better, the vectors go back;
    `run` then has those."""
    if not run.stages:
        return exact_on(sessions, alone[0], chosen)
    given = (request, sessions[0], court_of(sessions, alone, request, chosen), run, start)
    if origin is None and alone[0].single() is not None:
        fidelity = yield from _against_plain(*given)
    else:
        fidelity = yield from _against_start(*given, None if origin is None else origin.embedding.name)
    if alone[0].single() is None and not alone[0].networks():
        yield from _too_much(request, sessions[0], fidelity.hardest())
    worse = [s.text for s in fidelity.sentences if s.worse()]
    if worse and request.use is not Use.WHOLE:
        closer = f"{leaving_out(fidelity.reference)} comes closer than the embedding"
        yield Note(f"In sentences such as {worse[0]!r} {closer}.")
    return fidelity


def _against_plain(
    request: EstimateRequest, session: Session, court: Court, run: Run, start: Vectors
) -> Iterator[Phase | Note]:
    def taken_back(share: float) -> Vectors:
        return {key: torch.lerp(start[key], rows, share) for key, rows in run.best.items()}

    shares = [1.0, *(BACK if _starts_as_the_prompt(request, session, start) else ())]
    ways = [partial(taken_back, share) for share in shares]
    for progress in first_good(court, ways):
        if not isinstance(progress, Fidelity):
            yield Phase(*progress)
            continue
        fidelity = progress
    share = shares[fidelity.taken]
    if share < 1:
        run.best = ways[fidelity.taken]()
        yield Note((WENT_BACK if share else STAYED).format(leaving_out(fidelity.reference), 100 * share))
    return fidelity


def _against_start(
    request: EstimateRequest, session: Session, court: Court, run: Run, start: Vectors, file: str | None
) -> Iterator[Phase | Note]:
    """The same for a run whose start is not the prompt without its weights: a file that is continued, or the tokens of
    a prompt that is several texts."""
    count = len(next(iter(start.values())))
    prompt = initial_vectors(replace(request, continue_from="", start=Start.TEXT, vectors=count), session)
    plain = prompt if file and _starts_as_the_prompt(request, session, prompt) else None
    name = file or "the best of the prompt's own tokens"
    for progress in measure_against(court, run.best, start, plain, (1.0, *BACK)):
        if not isinstance(progress, Kept):
            yield Phase(*progress)
            continue
        kept = progress
    run.best, share = kept.vectors, 100 * kept.share
    given = {"name": name, "leaving_out": leaving_out(kept.fidelity.reference)}
    if not kept.back_to_start:
        yield Note(FILE_POOR.format(**given))
    if share < 100:
        to_start = (START_BACK if share else START_KEPT).format(**given, share=share)
        to_plain = (WENT_BACK if share else STAYED).format(given["leaving_out"], share)
        yield Note(to_start if kept.back_to_start else to_plain)
    return kept.fidelity


def _too_much(request: EstimateRequest, session: Session, fidelity: Fidelity) -> Iterator[Note]:
    """Says where one word is not enough for a prompt of several texts, and what to write instead."""
    if not fidelity.below_plain() and fidelity.error <= TOO_FAR:
        return
    why = f"its error is {fidelity.error:.2f} of an empty prompt's"
    if fidelity.below_plain():
        why += "; leaving the weights out comes nearer"
    read = partial(session.read, negative=request.target is Which.NEGATIVE)
    texts = texts_of(read(request.text, request.sampling_steps))
    words = {text: f"{request.name}-{number}" for number, text in enumerate(texts, 1)}
    with suppress(EstimateError):  # what has no plain spelling isn't offered
        paste = put_together(read, request.text, request.sampling_steps, words)
        yield Note(TOO_MUCH.format(texts=len(texts), why=why, paste=paste))


def _starts_as_the_prompt(request: EstimateRequest, session: Session, start: Vectors) -> bool:
    """Whether the start is the prompt without its weights, so that going back there leaves just them out."""
    tokens = session.token_vectors(own_text(request, session))
    return all(
        len(start[key]) >= len(rows) and torch.equal(start[key][: len(rows)], rows) for key, rows in tokens.items()
    )


def facts_of(
    request: EstimateRequest, infos: Sequence[ModelInfo], run: Run, counts: dict[int, float], origin: Continued | None
) -> dict[str, Any]:
    """What the file remembers of how it was made."""
    return {
        "prompt": request.prompt,
        "negative": request.negative,
        "settings": request.record(),
        "stages": run.stages,
        "seed": request.seed,
        "sd_checkpoint_name": infos[0].name,
        "sd_checkpoint": infos[0].hash,
        **({"checkpoints": [{"name": info.name, "hash": info.hash} for info in infos]} if len(infos) > 1 else {}),
        "step": len(run.losses) + (0 if origin is None else origin.steps),
        **({} if origin is None else origin.facts()),
        **({"errors_by_vectors": counts} if counts else {}),
    }


def record_of(
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
