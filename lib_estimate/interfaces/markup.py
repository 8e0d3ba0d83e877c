"""Pieces of HTML that the tab shows: how far a run is, notes, a table."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from lib_estimate.batch import HEADINGS, Row, cells, summary
from lib_estimate.interfaces.fields import WORDS, in_the_tab
from lib_estimate.interfaces.view import duration
from lib_estimate.report.fidelity import Fidelity


def bar(fraction: float, seconds_left: float | None, words: str) -> str:
    left = f", about {duration(seconds_left)} left" if seconds_left else ""
    share = f"{100 * fraction:.0f}%"
    return (
        f"<div class='bar'><div style='width:{share}'></div></div>"
        f"<p>{share}{left}</p><p class='words'>{html.escape(words)}</p>"
    )


def efforts(takes: Mapping[str, str]) -> str:
    """What a run takes with each effort."""
    said = ", ".join(f"<b>{WORDS[effort]}</b> {words}" for effort, words in takes.items())
    return f"<p class='words'>{said}, with the report</p>"


def idle() -> str:
    return "<p class='words'>Type a prompt and a name, then press Estimate!</p>"


def noted(notes: Sequence[str]) -> str:
    return "".join(f"<p class='note'>{html.escape(in_the_tab(note))}</p>" for note in notes)


def failed(sentences: str) -> str:
    """One sentence to a line."""
    return f"<p class='bad'>{'<br>'.join(map(html.escape, in_the_tab(sentences).splitlines()))}</p>"


def folded(title: str, text: str) -> str:
    """Text that is not for everybody, as it is."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def result(fidelity: Fidelity, lines: Sequence[str], notes: Sequence[str]) -> str:
    """Figures in words, lines of HTML, good or bad; and notes."""
    worth = fidelity.recovered is None or fidelity.recovered > 0
    return f"<p class='{'good' if worth else 'bad'}'>{'<br>'.join(lines)}</p>{noted(notes)}"


def table(rows: Sequence[Row]) -> str:
    """What became of the lines of a batch."""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "".join(
        f"<tr>{''.join(f'<td>{html.escape(in_the_tab(cell))}</td>' for cell in cells(row))}</tr>" for row in rows
    )
    mood = "bad" if any(row.failed for row in rows) else "good"
    return f"<p class='{mood}'>{summary(rows)}</p><table><tr>{head}</tr>{body}</table>"
