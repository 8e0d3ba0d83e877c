from __future__ import annotations

import dataclasses
import math

import pytest
from PIL import Image

from lib_estimate import job
from lib_estimate.interfaces.view import views
from lib_estimate.progress import Cancel, Interrupted
from lib_estimate.report.plots import live_curve
from lib_estimate.request import Part, Use


def test_a_run_moves_on_in_words_and_ends_with_its_outcome(host, short) -> None:
    request = dataclasses.replace(short, part=Part.AUTO, use=Use.WHOLE, steps=3, images=1)
    seen = list(views(request, host, Cancel()))
    fractions = [view.fraction for view in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert len(set(fractions)) > 10
    assert any("Learning (unet and sketch): step" in view.words for view in seen)
    assert any(isinstance(view.curve, Image.Image) for view in seen)
    assert [view.outcome for view in seen[:-1]] == [None] * (len(seen) - 1)
    assert isinstance(seen[-1].outcome, job.Outcome)


def test_an_interrupted_run_says_so(host, short) -> None:
    cancel = Cancel()

    def run() -> None:
        for view in views(short, host, cancel):
            if "Learning" in view.words:
                cancel.discard()

    with pytest.raises(Interrupted, match="Nothing was saved"):
        run()


def test_the_curve_shows_what_it_is_given() -> None:
    empty = live_curve([(1, 0.1), (2, 0.01)], [], None)
    with_errors = live_curve([(1, 0.1), (2, 0.01)], [(1, 0.05), (2, 0.02)], None)
    with_plain = live_curve([(1, 0.1), (2, 0.01)], [(1, 0.05), (2, 0.02)], 0.03)
    assert len({image.tobytes() for image in (empty, with_errors, with_plain)}) == 3
    assert live_curve([(1, float("nan"))], [], None).size == empty.size


def test_the_curve_breaks_off_between_two_measures() -> None:
    losses, errors = [(1, 0.5), (40, 0.1)], [(1, 1.0), (20, 0.9), (21, 0.1), (40, 0.09)]
    joined = live_curve(losses, errors, None)
    apart = live_curve(losses, [*errors[:2], (20, math.nan), *errors[2:]], None)
    blue = [sum(pixel == (30, 100, 200) for pixel in picture.getdata()) for picture in (joined, apart)]
    assert 0 < blue[1] < blue[0]
