"""The figures of a report as sentences, for people."""

from __future__ import annotations

from collections.abc import Iterator

from lib_estimate.report.fidelity import Fidelity, OnCheckpoint, median_and_worst

LITTLE = 0.8  # share of the unweighted error from which on a sentence is said to carry little
# By what the prompt's pictures are compared with (`Fidelity.reference`): what is there in the prompt and not in that,
# with a verb and without; and what it is.
CHANGES = {
    "without_lora": "the LoRA changes",
    "unweighted": "the weights change",
    "empty": "the prompt changes",
}
LEFT_OUT = {"without_lora": "the LoRA", "unweighted": "the weights"}
REFERENCES = {
    "without_lora": "without the LoRA",
    "unweighted": "without weights",
    "empty": "empty prompt",
}


def leaving_out(plain: str) -> str:
    """What could be done in place of an embedding, of the one that figures are held against."""
    return f"leaving {LEFT_OUT.get(plain, 'the prompt')} out"


def result_sentence(fidelity: Fidelity, name: str) -> str:
    """The figures in words."""
    shown = f"{name} on {fidelity.checkpoints[0].name}" if fidelity.checkpoints else name
    lines = [*_pictures_in_words(fidelity, shown), *_steps_in_words(fidelity)]
    for there, fitted, where in (
        (fidelity.beside, True, "Beside your prompts"),
        (fidelity.beside, False, "Beside prompts it was not learnt with"),
        (fidelity.sentences, True, "In the sentences it was made for"),
        (fidelity.sentences, False, "In other sentences"),
    ):
        shares = median_and_worst(there, fitted)
        if shares:
            lines.append(_shares_in_words(where, shares, fidelity.reference))
    others = median_and_worst(fidelity.sentences, fitted=False)
    weak = [s.text for s in fidelity.sentences if s.share is not None and s.share > LITTLE]
    if weak and others and others["median"] <= 1:
        lines.append(f"It carries little in sentences such as {weak[0]!r}.")
    lines += [_row_in_words(each) for each in fidelity.checkpoints]
    return "\n".join(lines)


def _shares_in_words(where: str, shares: dict[str, float], plain: str) -> str:
    if shares["median"] > 1:
        return f"{where} it does worse than {leaving_out(plain)}: keep it to what it was made for."
    worse = f"; above 100% is worse than {leaving_out(plain)}" if plain in LEFT_OUT else ""
    return (
        f"{where} {_percent(shares['median'])} of what {CHANGES[plain]} is left (median; worst "
        f"{_percent(shares['worst'])}{worse})."
    )


def _pictures_in_words(fidelity: Fidelity, name: str) -> Iterator[str]:
    if fidelity.picture_error is None:
        return
    what = f"of what {CHANGES[fidelity.reference]} in the finished pictures"
    left = f"{_percent(fidelity.picture_error)} is left (picture error"
    text = f"{name}: {what}, {left}"
    if fidelity.reference == "without_lora":
        text = f"{name} took over {100 * max(0.0, 1 - fidelity.picture_error):.0f}% {what}; {left}"
    if len(fidelity.picture_errors) > 1:
        text += f"; picture by picture {', '.join(map(_percent, fidelity.picture_errors))}"
    yield text + ")."


def _percent(share: float) -> str:
    return f"{100 * share:.{1 if share < 0.1 else 0}f}%"


def _steps_in_words(fidelity: Fidelity) -> Iterator[str]:
    text = f"At single sampling steps its error is {fidelity.error:.4f} of an empty prompt's"
    if fidelity.recovered is None:
        yield text + "."
        return
    carried = "the emphasis" if fidelity.reference == "unweighted" else f"what {CHANGES[fidelity.reference]}"
    yield (
        f"{text}, {fidelity.unweighted_error:.4f} without {LEFT_OUT[fidelity.reference]}; it carries "
        f"{100 * max(0.0, fidelity.recovered):.0f}% of {carried} there."
    )


def _row_in_words(row: OnCheckpoint) -> str:
    fidelity, parts = row.fidelity, []
    if fidelity.picture_error is not None:
        parts.append(f"picture error {_percent(fidelity.picture_error)}")
    parts.append(f"error {fidelity.error:.4f}")
    if fidelity.recovered is not None:
        parts.append(f"{100 * max(0.0, fidelity.recovered):.0f}% of the emphasis")
    if fidelity.pixel_difference is not None:
        parts.append(f"pixels {_percent(fidelity.pixel_difference)} off")
    worse = ". Leaving the weights out does better there" if row.worse else ""
    return f"On {row.name}: {', '.join(parts)}{worse}."
