"""A prompt taken apart into the texts it is made of (parts of AND, stages of editing and alternation), and put together
again from other words in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from lib_estimate.errors import RequestError
from lib_estimate.hosts.base import PromptPart

Read = Callable[[str, int], Sequence[PromptPart]]  # read(prompt, sampling steps), as the host reads it


def texts_of(parts: Sequence[PromptPart]) -> tuple[str, ...]:
    """The different texts, without the blanks around them, in the order in which they first stand there."""
    return tuple(dict.fromkeys(text.strip() for part in parts for _, text in part.texts))


def put_together(read: Read, prompt: str, steps: int, words: Mapping[str, str]) -> str:
    """The prompt with a word for each of its texts: `first AND second :0.6`, `[first:second:0.5]`, `[first|second]`.

    It is read back before it is given: at every sampling step the words stand where the texts stood, and where it can
    be also with another number of steps. RequestError where no such sentence is found.
    """
    wanted = {count: _renamed(read(prompt, count), words) for count in (steps, 2 * steps)}
    written = [_written(read(prompt, steps), words, steps, shares) for shares in (True, False)]
    for counts in ((steps, 2 * steps), (steps,)):
        for sentence in written:
            if all(_as_it_runs(read(sentence, count), count) == wanted[count] for count in counts):
                return sentence
    raise RequestError(
        f"The prompt {prompt!r} can't be put together again from one word per stage: its stages change in a way that "
        "has no plain spelling. Make an embedding of each stage by itself."
    )


def _renamed(parts: Sequence[PromptPart], words: Mapping[str, str]) -> list:
    return [(weight, [words.get(text) for text in texts]) for weight, texts in _as_it_runs(parts, _steps(parts))]


def _steps(parts: Sequence[PromptPart]) -> int:
    return max(part.texts[-1][0] for part in parts)


def _as_it_runs(parts: Sequence[PromptPart], steps: int) -> list[tuple[float, list[str]]]:
    """Of each part its weight and its text at the sampling steps, counted as the host counts them."""
    return [(part.weight, [part.text_at(step).strip() for step in range(1, steps + 1)]) for part in parts]


def _written(parts: Sequence[PromptPart], words: Mapping[str, str], steps: int, shares: bool) -> str:
    pieces = []
    for part in parts:
        (_, texts), *_ = _as_it_runs([part], steps)
        weight = "" if part.weight == 1 else f" :{part.weight:.6f}".rstrip("0").rstrip(".")
        pieces.append(_schedule([words[text] for text in texts], shares) + weight)
    return " AND ".join(pieces)


def _schedule(running: Sequence[str], shares: bool) -> str:
    """Words step by step as one spelling; `shares`: changes at shares of the steps instead of at their numbers."""
    steps = len(running)
    if len(set(running)) == 1:
        return running[0]
    for period in range(2, steps // 2 + 1):
        if all(word == running[step % period] for step, word in enumerate(running)):
            return f"[{'|'.join(running[:period])}]"
    changes = [step for step in range(1, steps) if running[step] != running[step - 1]]
    spelled = running[changes[-1]]
    for step in reversed(changes):
        spelled = f"[{running[step - 1]}:{spelled}:{f'{step / steps:.4g}' if shares else step}]"
    return spelled
