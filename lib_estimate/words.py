"""One request, one word or several: for the prompt and the negative prompt, or for each text of a prompt with AND or
editing. This is what the tab and the command line call; `job` makes a single word.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lib_estimate import job
from lib_estimate.costs import case_of, of_learning, of_recording, of_report_of_words, of_stages
from lib_estimate.errors import RequestError
from lib_estimate.files.claim import claimed
from lib_estimate.files.destination import first_name
from lib_estimate.files.embedding import Embedding, Vectors
from lib_estimate.files.rescue import save_all
from lib_estimate.hosts.base import Host, Network, Session
from lib_estimate.hosts.several import each_of
from lib_estimate.learn.initial import initial_vectors
from lib_estimate.learn.learning import Run
from lib_estimate.learn.needs import shortage_said
from lib_estimate.progress import Cancel, Interrupted, Next, Note, Phase, Planned
from lib_estimate.report.court_of_words import CourtOfWords
from lib_estimate.report.fidelity import Fidelity, exact, first_good
from lib_estimate.request import EstimateRequest, Use
from lib_estimate.request import Target as Which
from lib_estimate.target.recording import materials_of_both
from lib_estimate.target.target import Target, build_target
from lib_estimate.target.texts import put_together, texts_of
from lib_estimate.target.together import Together, build_together

ONE_MODEL = (
    "Several words at once are made on one checkpoint: give one --model, or make each word by itself, without --stages "
    "and --target both."
)
ONE_TEXT = "The prompt is the same text at every step and has no AND: one word holds it."


@dataclass(frozen=True)
class TakenApart:
    """The words of a request, and what to write with them."""

    words: tuple[EstimateRequest, ...]  # each as a request of its own
    texts: tuple[tuple[str, ...] | None, tuple[str, ...] | None]  # of the prompt and of the negative prompt
    written: dict[str, str]  # by what the side is called


@dataclass
class Learnt:
    """What became of one word."""

    start: Vectors
    run: Run


def estimate(request: EstimateRequest, host: Host, cancel: Cancel | None = None) -> Iterator[job.Progress]:
    """Runs one estimate; several words are saved together at its end. Raises EstimateError with a sentence."""
    if not request.several:
        yield from job.estimate(request, host, cancel)
        return
    if len(each_of(host)) > 1:
        raise RequestError(ONE_MODEL)
    cancel, started = cancel or Cancel(), time.perf_counter()
    job.check_destination(replace(request, name=first_name(request)))
    folder, first = Path(request.out), first_name(request).strip()
    with ExitStack() as stack:
        stack.enter_context(claimed(folder, first))
        session = stack.enter_context(host.session())
        stack.enter_context(shortage_said(request, [session]))
        session.place(Network.TEXT)
        apart = taken_apart(request, session)
        stack.enter_context(claimed(folder, *(word.name for word in apart.words if word.name != first)))
        paths = [job.destination(word, [session.info]) for word in apart.words]
        yield from job.notes_on(request, session, None)
        if len(apart.words) == 1:
            yield Note(ONE_TEXT)
        bill = job.Bill([session])
        together, learnt = yield from _learn(request, session, apart, bill, cancel)
        facts = _facts(request, session, apart, learnt)

        def save(more: dict) -> list[Embedding]:
            made = [
                Embedding(path.stem, one.run.best, {**about, **more})
                for path, one, about in zip(paths, learnt, facts, strict=True)
            ]
            save_all(list(zip(made, paths, strict=True)), overwrite=request.overwrite)
            return made

        try:
            fidelity = yield from _report(request, session, together, learnt)
        except BaseException as error:  # whatever stops the report, what was learnt must not be lost
            save({})
            raise job.saved_anyway(error, paths, request, [session]) from error
        bill.charge("report")
        made = save({**fidelity.figures(), "forwards": bill.forwards})
        record = _record(request, session, apart, paths, learnt, fidelity) | {
            "forwards": bill.forwards, "seconds": time.perf_counter() - started,
        }  # fmt: skip
    losses = [loss for one in learnt for loss in one.run.losses]
    yield job.Outcome(paths[0], made[0], fidelity, losses, record, apart.written, tuple(paths[1:]))


def taken_apart(request: EstimateRequest, session: Session) -> TakenApart:
    """The words that a request makes. RequestError where what is to be written with them has no spelling."""
    words: list[EstimateRequest] = []
    found: list[tuple[str, ...] | None] = []
    written: dict[str, str] = {}
    for which, side, text in (
        (Which.PROMPT, "prompt", request.prompt),
        (Which.NEGATIVE, "negative prompt", request.negative),
    ):
        if request.target not in (which, Which.BOTH):
            found.append(None)
            continue
        read = partial(session.read, negative=which is Which.NEGATIVE)
        texts = texts_of(read(text, request.sampling_steps)) if request.stages else (text,)
        suffix = "-neg" if which is Which.NEGATIVE and request.target is Which.BOTH else ""
        names = [request.name.strip() + suffix + (f"-{n}" if len(texts) > 1 else "") for n in range(1, len(texts) + 1)]
        found.append(texts)
        called = dict(zip(texts, names, strict=True))
        written[side] = put_together(read, text, request.sampling_steps, called) if request.stages else names[0]
        words += [_of_word(request, which, text, name) for text, name in called.items()]
    return TakenApart(tuple(words), (found[0], found[1]), written)


def _of_word(request: EstimateRequest, which: Which, text: str, name: str) -> EstimateRequest:
    side = {"prompt": text} if which is Which.PROMPT else {"negative": text}
    return replace(request, name=name, target=which, stages=False, use=Use.WHOLE, sentence=(), **side)


def _learn(
    request: EstimateRequest, session: Session, apart: TakenApart, bill: job.Bill, cancel: Cancel
) -> Iterator[job.Progress]:
    """All words in their places, and what became of each."""
    targets = [build_target(word, session, beside=request.prompt) for word in apart.words]
    together = build_together(request, session, targets, apart.texts)
    yield _planned(request, session, apart, targets, bill)
    materials = yield from _recorded_at_once(request, session, targets, cancel)
    bill.charge("recording")
    learnt: list[Learnt] = []
    for number, (word, target) in enumerate(zip(apart.words, targets, strict=True)):
        session.place(Network.TEXT)
        yield Next(f"{word.name}: word {number + 1} of {len(apart.words)}.", number + 1, len(apart.words))
        start = initial_vectors(word, session)
        if cancel.wanted == "save":  # what comes after an interruption is left as it starts
            learnt.append(Learnt(start, Run(start, [], [], "interrupted")))
            continue
        run, start, _ = yield from job.learnt(
            word,
            [session],
            [target],
            cancel,
            bill,
            None if materials is None else [materials[number]],
            one_of_several=True,
        )
        learnt.append(Learnt(start, run))
        if cancel.wanted == "discard":
            raise Interrupted("Interrupted. Nothing was saved.")
    return together, learnt


def _planned(
    request: EstimateRequest, session: Session, apart: TakenApart, targets: Sequence[Target], bill: job.Bill
) -> Planned:
    made = [
        (word, case_of(word, [session], target))
        for word, target in zip(apart.words, targets, strict=True)
        if not job.own_tokens_do(word, [session], [target])
    ]
    at_once = not request.stages and len(made) == len(apart.words)
    costs = [*of_recording(request, made[0][1], sides=2)] if at_once else []
    for word, case in made:
        costs += of_stages(word, case) if at_once else of_learning(word, case)
    cases, parts = [case for _, case in made], len(session.read(request.prompt, request.sampling_steps))
    return Planned((*costs, *(of_report_of_words(request, cases, parts) if cases else ())), bill.spent)


def _recorded_at_once(
    request: EstimateRequest, session: Session, targets: Sequence[Target], cancel: Cancel
) -> Iterator[Phase]:
    """The prompt and the negative prompt from the same generations; None where the words are others."""
    if request.stages or any(job.own_tokens_do(request, [session], [target]) for target in targets):
        return None
    yield from job.arrange(request, [session], targets[0])
    return (yield from materials_of_both(request, session, (targets[0], targets[1]), cancel))


def _report(
    request: EstimateRequest, session: Session, together: Together, learnt: Sequence[Learnt]
) -> Iterator[job.Progress]:
    """The Fidelity of all words in their places. Where leaving the weights out does better, all of them go back."""
    if not any(one.run.stages for one in learnt):
        return exact(together, ())

    def taken_back(share: float) -> list[Vectors]:
        return [{key: torch.lerp(one.start[key], rows, share) for key, rows in one.run.best.items()} for one in learnt]

    shares = (1.0, *job.BACK)
    ways = [partial(taken_back, share) for share in shares]
    for progress in first_good(CourtOfWords(session, together, request), ways):
        if not isinstance(progress, Fidelity):
            yield Phase(*progress)
            continue
        fidelity = progress
    share = shares[fidelity.taken]
    if share < 1:
        for one, vectors in zip(learnt, ways[fidelity.taken](), strict=True):
            one.run.best = vectors
        yield Note(job.WENT_BACK.format(100 * share) if share else job.STAYED)
    return fidelity


def _facts(request: EstimateRequest, session: Session, apart: TakenApart, learnt: Sequence[Learnt]) -> list[dict]:
    """What each file remembers: how it was made, and what it stands beside."""
    common = {"settings": request.record(), "written": apart.written}
    return [
        {**job.facts_of(word, [session.info], one.run, {}, None), **common}
        for word, one in zip(apart.words, learnt, strict=True)
    ]


def _record(
    request: EstimateRequest,
    session: Session,
    apart: TakenApart,
    paths: Sequence[Path],
    learnt: Sequence[Learnt],
    fidelity: Fidelity,
) -> dict:
    """All of it as plain values: the figures of all words together, and of each what it is."""
    whole = job.record_of(request, paths[0], session.info, learnt[0].run, {}, fidelity, 0.0)
    words = [
        {"name": word.name, "file": str(path), "text": word.text, "vectors": len(next(iter(one.run.best.values()))),
         "steps_run": len(one.run.losses), "stages": one.run.stages, "stopped": one.run.stopped}
        for word, path, one in zip(apart.words, paths, learnt, strict=True)
    ]  # fmt: skip
    return whole | {"words": words, "written": apart.written}
