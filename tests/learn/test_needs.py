"""What a run is said to need: against what is counted on models of full size, and what is made of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile
from unittest import mock

import pytest
import torch
from torch import nn

from lib_estimate import job
from lib_estimate.hosts.base import ModelInfo, Network, Room
from lib_estimate.hosts.placement import Placement
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.learn.needs import GB, RESERVE, Case
from lib_estimate.progress import Note
from lib_estimate.request import EstimateRequest, Offload, Part, Use
from tests.bench import memory

TEXT, ATTENTION, UNET, VAE = Network
REQUEST = EstimateRequest(prompt="a (red:1.6) circle", name="needs", use=Use.WHOLE)
XL = ModelInfo("xl", None, {"clip_l": 768, "clip_g": 1280}, 75, 4, 8, 1024, torch.device("cuda"), torch.float16)
WEIGHTS = {TEXT: int(1.52 * GB), ATTENTION: int(1.02 * GB), UNET: int(4.78 * GB), VAE: int(0.16 * GB)}
SWITCHES = {Offload.NETWORKS: "--offload networks", Offload.BLOCKS: "--offload blocks"}


def case(free: float | None, mode: Offload = Offload.AUTO, **changes) -> Case:
    room = Room(None if free is None else int(free * GB), mode, WEIGHTS, int(0.1 * GB), int(0.09 * GB), SWITCHES)
    return Case(replace(REQUEST, **changes), XL, room, False, True)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_is_said_is_what_is_counted(family) -> None:
    config = pytest.importorskip("torch.fx.experimental._config", reason="PyTorch before 2.6 counts nothing on meta")
    if not hasattr(config, "meta_nonzero_assume_all_nonzero"):
        pytest.skip("PyTorch before 2.6 counts nothing on meta")
    fused = mock.patch.object(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: memory.Fused.apply(q, k, v)
    )
    with memory.on_meta(family) as session, fused:
        side = memory.SIDE[family]
        x, timestep = torch.empty(2, 4, side, side, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
        with torch.no_grad():
            given = session.encode(["a red circle"])

        @torch.no_grad()
        def forward() -> None:
            session.predict_noise(x, timestep, given)

        def gradient() -> None:
            session.sensitivity(x[:1], timestep[:1], given, x[:1])

        said = Case(REQUEST, session.info, session.room(), False, True)
        each = {mode: {need.phase: need for need in said.needs(mode)} for mode in memory.MODES}
        for mode in (Offload.OFF, Offload.BLOCKS):
            counted = memory.needs(session, memory.Phase((UNET,), forward), mode, recomputed=False)
            assert each[mode]["Recording"].least - RESERVE == pytest.approx(counted, rel=0.25)
        phase = memory.Phase((UNET,), gradient, int(said._sketch()))
        for mode, recomputed in ((Offload.NETWORKS, False), (Offload.NETWORKS, True)):
            counted = memory.needs(session, phase, mode, recomputed=recomputed)
            need = each[mode]["Sketching the U-Net"]
            assert (need.least if recomputed else need.kept) - RESERVE == pytest.approx(counted, rel=0.25)


@pytest.mark.parametrize(
    ("free", "changes", "mode", "recompute", "words"),
    [
        (24, {}, Offload.OFF, False, None),
        (11, {}, Offload.OFF, True, "a third slower"),
        (9, {}, Offload.NETWORKS, True, "Learning with the U-Net at 1024x1024 needs about 12.6 GB, 9.0 are free"),
        (7.4, {}, Offload.BLOCKS, False, "block by block"),
        (7.4, {"use": Use.ANYWHERE}, Offload.NETWORKS, True, "a third slower"),
        (7.4, {"part": Part.CROSS_ATTENTION}, Offload.NETWORKS, False, None),
        (3.7, {"part": Part.CROSS_ATTENTION}, Offload.BLOCKS, False, "block by block"),
        (5, {}, Offload.BLOCKS, False, "What would: --memory 0.5; --part cross-attention; --width 576 --height 576."),
        (1, {}, Offload.BLOCKS, False, "a card with more memory"),
        (None, {}, Offload.OFF, False, None),
    ],
)
def test_auto_takes_the_first_way_that_fits(free, changes, mode, recompute, words) -> None:
    way = case(free, **changes).way()
    assert (way.mode, way.recompute) == (mode, recompute)
    assert words in way.note if words else way.note is None


def test_what_the_user_chose_stays_and_what_would_fit_is_said() -> None:
    way = case(6.5, Offload.OFF).way()
    assert way.mode is Offload.OFF
    assert "probably not fit. What would: --offload blocks" in way.note
    assert "--offload" not in case(3, Offload.BLOCKS).way().note
    note = case(8.2, Offload.NETWORKS, width=768, height=768).way().note
    assert note.startswith("Learning with the U-Net at 768x768 needs about 10.4 GB, 8.2 are free: it will recompute")


def test_what_is_said_to_fit_fits() -> None:
    tight = case(5)
    assert not tight.fits(Offload.BLOCKS)
    assert replace(tight, request=replace(tight.request, memory=0.5)).fits(Offload.BLOCKS)
    assert replace(tight, request=replace(tight.request, width=576, height=576)).fits(Offload.BLOCKS)
    assert not replace(tight, request=replace(tight.request, width=640, height=640)).fits(Offload.BLOCKS)


def test_a_run_says_so_before_it_records(host, short) -> None:
    """On a card of which little is free."""
    parts, cards = host.parts, []

    class Small(StandaloneHost):
        def placement(self) -> Placement:
            text = [encoder.model for encoder in parts.text_encoders]
            free = int(0.35 * GB)
            cards.append(Placement(text, parts.unet, parts.vae, torch.device("cpu"), Offload.AUTO, free=lambda: free))
            return cards[-1]

    small = Small.__new__(Small)
    small.__dict__ |= host.__dict__
    progress = job.estimate(short, small)
    notes = [each.text for each in takewhile(lambda each: isinstance(each, Note), progress)]
    progress.close()
    assert any("with the U-Net at 128x128 needs about 0.4 GB" in note for note in notes)
    assert cards[0].mode is Offload.OFF
    assert cards[0].held == 0
