"""What a run will cost, phase by phase, before it starts: in U-Net forward-equivalents (a latent 1, with gradient 3).

The figures follow from what the phases do: a test holds them against what a session counts. What can't be known before
is planned as it usually comes: no line search that needs more, no stage that stops early, no way back in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lib_estimate.errors import PromptSyntaxError
from lib_estimate.hosts.base import Session
from lib_estimate.hosts.denoising import RECOMPUTED, WITH_GRADIENT
from lib_estimate.learn import plan
from lib_estimate.learn.count import COUNTS, TRIAL_STEPS
from lib_estimate.learn.fit import CHECKS
from lib_estimate.learn.learning import ANCHORS
from lib_estimate.learn.plan import LBFGS, RUNS_THE_UNET, Goal, Stage
from lib_estimate.learn.registry import LBFGS_EVALUATIONS
from lib_estimate.learn.starts import how_many
from lib_estimate.progress import Cost
from lib_estimate.prompt.schedule import prompt_schedule, split_and
from lib_estimate.report.fidelity import BESIDE_STEPS, LEVELS, SEEDS, SENTENCE_LATENTS, report_sentences
from lib_estimate.request import AUTO_VECTORS, Effort, EstimateRequest, Use
from lib_estimate.request import Target as Which
from lib_estimate.target import besides
from lib_estimate.target.bank import other_is_empty
from lib_estimate.target.recording import Recording, checks, generations, recording
from lib_estimate.target.target import Target, own_text

# An evaluation of a loss that runs no U-Net, with its gradient, in forwards: counted on architectures of full size by
# `python -m tests.bench`.
PRICES = {Goal.HIDDEN_STATES: 0.04, Goal.CROSS_ATTENTION: 0.05, Goal.SKETCH: 0.33}
IN_SENTENCES = 0.5


@dataclass(frozen=True)
class Case:
    """What the cost of a request depends on, beside the request: how its prompts are built, and on what it runs."""

    parts: tuple[int, ...] = (1,)  # of AND in each prompt that something is recorded under
    weights: bool = True  # whether leaving them out changes the prompt
    steady: bool = True  # whether what becomes the word is one text at every step
    heavy: bool = False  # whether its only part has a weight of its own, as of AND
    negative: bool = False
    networks: bool = False  # whether a LoRA is to be taken over
    other_empty: bool = False  # whether the other side of CFG is the empty prompt
    squeezed: bool = False
    starts: int = 0  # that are tried
    tokens: int = 8
    checkpoints: int = 1
    with_gradient: int = WITH_GRADIENT

    def composed(self) -> bool:
        return self.networks or self._and()

    def _and(self) -> bool:
        return not self.negative and (self.parts[0] != 1 or self.heavy)

    def wanted(self) -> int:
        """Forwards that tell of a latent what the U-Net says in the word's place."""
        return 1 if self.negative else self.parts[0] + self._and()


def case_of(request: EstimateRequest, sessions: Sequence[Session], target: Target, *, recomputed: bool = False) -> Case:
    """Of a request's target alone."""
    session, first = sessions[0], target.guidance[0].positive
    if target.negative:
        texts = besides.learnt(request)
    elif request.use is Use.SENTENCE:
        texts = tuple(sentence.replace("{}", request.text) for sentence in request.sentence)
    else:
        texts = (request.text,)
    tokens = max(map(len, session.token_vectors(own_text(request, session)).values()))
    return Case(
        parts=tuple(len(session.read(text, request.sampling_steps)) for text in texts),
        weights=target.plain is not None,
        steady=target.single() is not None,
        heavy=len(first) == 1 and first[0][0] != 1.0,
        negative=target.negative,
        networks=bool(target.networks()),
        other_empty=other_is_empty(target),
        squeezed=isinstance(request.vectors, int) and tokens > request.vectors,
        starts=how_many(request, session, target.negative),
        tokens=tokens,
        checkpoints=len(sessions),
        with_gradient=RECOMPUTED if recomputed else WITH_GRADIENT,
    )


def of_learning(request: EstimateRequest, case: Case) -> list[Cost]:
    """Of recording and learning one word."""
    return [*of_recording(request, case), *of_stages(request, case)]


def of_run(request: EstimateRequest, case: Case) -> list[Cost]:
    """Of a run that makes one word."""
    against_start = bool(request.continue_from.strip()) or not case.steady
    return [*of_learning(request, case), *of_report(request, case, len(report_sentences(request)), against_start)]


def of_request(request: EstimateRequest) -> list[Cost]:
    """Of a run, as far as it can be told without a model: weights, say, are taken to be there."""
    sides = {Which.PROMPT: request.prompt, Which.NEGATIVE: request.negative}
    sides = {which: text for which, text in sides.items() if request.target in (which, Which.BOTH)}
    cases = {which: _read(request, which) for which in sides}
    if not request.several:
        return of_run(request, *cases.values())
    parts = next(iter(cases.values())).parts[0]
    if not request.stages:
        learnt = [cost for case in cases.values() for cost in of_stages(request, replace(case, steady=True, starts=0))]
        return [
            *of_recording(request, cases[Which.PROMPT], 2),
            *learnt,
            *of_report_of_words(request, [*cases.values()], parts),
        ]
    costs: list[Cost] = []
    for which, text in sides.items():
        word = replace(cases[which], steady=True, starts=0, heavy=False)
        word = word if which is Which.NEGATIVE else replace(word, parts=(1,))
        costs += of_learning(replace(request, use=Use.WHOLE), word) * _texts(request, text)
    return [*costs, *of_report_of_words(request, [*cases.values()], parts)]


def _read(request: EstimateRequest, which: Which) -> Case:
    text = request.negative if which is Which.NEGATIVE else request.prompt
    given = request.prompt if which is Which.PROMPT else besides.learnt(request)[0]
    parts, several = split_and(given), _texts(request, text)
    count = len(besides.learnt(request)) if which is Which.NEGATIVE else max(1, len(request.sentence))
    count = count if which is Which.NEGATIVE or request.use is Use.SENTENCE else 1
    return Case(
        parts=(len(parts),) * count,
        steady=several == 1,
        heavy=parts[0][1] != 1.0,
        negative=which is Which.NEGATIVE,
        networks=request.take_over_lora,
        other_empty=which is Which.PROMPT and not request.negative.strip(),
        starts=0 if several == 1 else several + 4,
    )


def _texts(request: EstimateRequest, text: str) -> int:
    """How many a prompt is, at different steps or composed with AND; one that can't be read is one."""
    try:
        pieces = [piece for piece, _ in split_and(text)]
        return len({each.strip() for piece in pieces for _, each in prompt_schedule(piece, request.sampling_steps)})
    except PromptSyntaxError:
        return 1


# ---- recording ----------------------------------------------------------------------------------------------------


def of_recording(request: EstimateRequest, case: Case, sides: int = 1) -> Iterator[Cost]:
    """sides: of CFG that are learnt from the same generations."""
    together = [case.parts] if case.negative else [(parts,) for parts in case.parts]
    for _ in range(case.checkpoints):
        for group in together:
            learnt, checked = recording(request), checks(request)
            yield Cost("Recording the target", _recorded(request, case, learnt, group))
            references = 0 if case.other_empty else sides * _latents(request, checked, len(group))
            yield Cost("Recording checks", _recorded(request, case, checked, group[::-1]) + references)


def _recorded(request: EstimateRequest, case: Case, what: Recording, group: tuple[int, ...]) -> int:
    ways = [group[index % len(group)] for index in range(generations(request, what, len(group)))]
    return what.steps * sum(1 + parts + case.networks for parts in ways)


def _latents(request: EstimateRequest, what: Recording, groups: int) -> int:
    return what.steps * generations(request, what, groups)


# ---- learning -----------------------------------------------------------------------------------------------------


def of_stages(request: EstimateRequest, case: Case) -> Iterator[Cost]:
    groups = len(case.parts) if case.negative else 1
    materials = case.checkpoints * (1 if case.negative else len(case.parts))
    bank = _latents(request, recording(request), groups)
    look = materials * _latents(request, checks(request), groups)  # at vectors by what the U-Net makes of them
    in_sentences = plan.in_sentences(request, steady=case.steady)
    gradient = materials * case.with_gradient
    if request.vectors == AUTO_VECTORS:
        yield _trials(request, case, bank, look, gradient)
    if case.starts:
        yield Cost("Trying starts", case.starts * look)
    stages = plan.stages(request, composed=case.composed(), steady=case.steady, squeezed=case.squeezed)
    if any(stage.goal in (Goal.SKETCH, Goal.NOISE_AND_SKETCH) for stage in stages):
        yield Cost("Sketching the U-Net", gradient * (ANCHORS[request.effort] if in_sentences else bank))
    for before, stage in enumerate(stages):
        name = f"Learning ({stage.goal.value})"
        if stage.goal not in RUNS_THE_UNET:
            price = IN_SENTENCES if in_sentences and stage.goal is Goal.SKETCH else PRICES[stage.goal]
            looks = _looks(stage) + 1 if stage.goal is Goal.HIDDEN_STATES else 0  # which only the U-Net can judge
            yield Cost(name, looks * look, evaluations(stage) * price * materials)
            continue
        latents = min(max(request.batch, stage.latents if stage.optimizer == LBFGS else 0), bank)
        looks = 1 + _looks(stage) + (before > 0)  # the start is looked at beside what is learnt already
        yield Cost(name, evaluations(stage) * latents * gradient + looks * look)


def evaluations(stage: Stage) -> int:
    """How often the loss is evaluated with its gradient. A step of L-BFGS begins where the one before ended."""
    return LBFGS_EVALUATIONS * stage.steps + 1 if stage.optimizer == LBFGS else stage.steps


def _looks(stage: Stage) -> int:
    return math.ceil(stage.steps / max(1, math.ceil(stage.steps / CHECKS)))


def _trials(request: EstimateRequest, case: Case, bank: int, look: int, gradient: int) -> Cost:
    """Of numbers of vectors, as if all of them were tried."""
    count = sum(number < case.tokens for number in COUNTS) + 1
    if case.composed():
        stage = plan.COMPOSED[Effort.QUICK]
        each = evaluations(stage) * min(max(request.batch, stage.latents), bank) * gradient + (2 + _looks(stage)) * look
        return Cost("Trying numbers", count * each)
    aside = PRICES[Goal.CROSS_ATTENTION] * (LBFGS_EVALUATIONS * TRIAL_STEPS + 1)
    return Cost("Trying numbers", count * look, count * aside)


# ---- report -------------------------------------------------------------------------------------------------------


def of_report(request: EstimateRequest, case: Case, sentences: int, against_start: bool = False) -> Iterator[Cost]:
    """sentences: that are measured in; against_start: what was learnt is held against what it began from."""
    pictures, steps = request.images or SEEDS, request.sampling_steps
    whole, latents = pictures * steps, pictures * min(LEVELS, steps)
    own, other = len(besides.own(request)), besides.OTHERS
    beside = min(BESIDE_STEPS, steps)
    parts = case.parts[0] if case.negative or request.use is not Use.SENTENCE else 1
    looked_at = case.weights * case.wanted()  # latents under the prompt without its weights
    reference = "without_lora" if case.networks else "unweighted" if case.weights else "empty"
    one_part = parts if case.negative else 1
    judged = [Cost("Noise", latents + sentences * SENTENCE_LATENTS + case.negative * (own + other) * beside)]
    if request.images:
        judged.append(Cost("Pictures (embedding)", whole * (1 + one_part)))
    for _ in range(case.checkpoints):
        references = latents * (case.networks + (not case.other_empty) + looked_at)
        yield Cost("Pictures (prompt)", whole * (1 + parts) + references)
        if request.images:
            yield Cost(f"Pictures ({reference})", whole * (1 + (parts if case.weights else one_part)))
        if sentences:
            plain = case.weights * (1 if case.steady else case.wanted())
            each = SENTENCE_LATENTS * (case.wanted() + 2 * case.networks + plain)
            yield Cost("Sentences", sentences * each)
        if case.negative:
            generated = sum(1 + parts for parts in case.parts[:own]) + 2 * other
            yield Cost("Other prompts", beside * (generated + (own + other) * (1 + case.weights)))
    for _ in range(1 + against_start):
        for _ in range(case.checkpoints):
            yield from judged


def of_report_of_words(request: EstimateRequest, cases: Sequence[Case], parts: int) -> Iterator[Cost]:
    """Of all words of a request at once, on both sides of CFG. parts: of AND in the prompt."""
    pictures, steps = request.images or SEEDS, request.sampling_steps
    whole, latents = pictures * steps, pictures * min(LEVELS, steps)
    weights = any(case.weights for case in cases)
    left = parts if request.stages else 1  # with the words in their places
    guided, embedded = (1 + count + (count > 1) for count in (parts, left))
    yield Cost("Pictures (prompt)", whole * (1 + parts) + latents * (embedded + weights * guided))
    if request.images:
        yield Cost(f"Pictures ({'unweighted' if weights else 'empty'})", whole * (1 + (parts if weights else left)))
    yield Cost("Noise", latents * embedded)
    if request.images:
        yield Cost("Pictures (embedding)", whole * (1 + left))
