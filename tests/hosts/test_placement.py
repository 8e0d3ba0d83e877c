"""Which networks are on the device in which phase, and that everything is back afterwards.

There is no card here: copies in main memory stand for what is on it. What is off it holds NaN meanwhile, so that a use
of weights that should have been brought, in a backward pass too, is seen in the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lib_estimate import job
from lib_estimate.errors import OutOfMemory, ReportFailed
from lib_estimate.hosts.base import Conditioning, Network
from lib_estimate.hosts.denoising import attention_modules, blocks_of
from lib_estimate.hosts.placement import Placement, Weight
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.progress import Cancel, Note, Phase, StepReport
from lib_estimate.request import HOLE, Effort, EstimateRequest, ModelOptions, Offload, Part, Use
from tests.small_models import small_model

TEXT, ATTENTION, UNET, VAE = Network
CPU = torch.device("cpu")


class Card(Placement):
    """A placement whose weights are spoilt while they are off the card."""

    def __init__(self, *given, **named) -> None:
        super().__init__(*given, **named)
        inside = [module for text in self.modules[TEXT] for module in text.modules()]
        tables = [module.token_embedding for module in inside if hasattr(module, "token_embedding")]
        self.readable = self._weights(tables)  # rows of the token tables are looked up wherever they are
        self._spoil(self._all.values())

    def _take_off(self, weights: Iterable[Weight]) -> None:
        weights = [weight for weight in weights if weight.on]
        super()._take_off(weights)
        self._spoil(weights)

    def _spoil(self, weights: Iterable[Weight]) -> None:
        for weight in weights:
            if weight.own.is_floating_point() and weight not in self.readable:
                weight.show(torch.full_like(weight.own, torch.nan))

    def end(self) -> None:
        super().end()
        for weight in self._all.values():
            weight.show(weight.own)

    def there(self) -> set[Network]:
        """The networks whose weights are all on the card; of the U-Net by blocks, those outside of blocks."""
        return {network for network in Network if all(weight.on for weight in self._needed(network))}


class CardHost(StandaloneHost):
    def placement(self) -> Placement:
        parts = self.parts
        text = [encoder.model for encoder in parts.text_encoders]
        self.card = Card(text, parts.unet, parts.vae, CPU, self.mode)
        return self.card


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("placement") / "model"
    small_model("sdxl").pipeline().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(folder) -> StandaloneHost:
    return aligned(StandaloneHost(ModelOptions(model=str(folder), device="cpu")))


def aligned(host: StandaloneHost) -> StandaloneHost:
    """Weights in memory of their own. In that of a file they lie as they come, and a sum then rounds otherwise."""
    for tensor in tensors(host):
        tensor.data = tensor.data.clone()
    with host.session() as session:
        session.encode([HOLE])  # at first use transformers leaves hooks of its own
    return host


@pytest.fixture(params=[Offload.NETWORKS, Offload.BLOCKS], ids=lambda mode: mode.value)
def carded(request, plain) -> CardHost:
    """The same model with a card."""
    host = CardHost.__new__(CardHost)
    host.__dict__ |= plain.__dict__ | {"mode": request.param}
    return host


@pytest.fixture
def brief(tmp_path) -> EstimateRequest:
    return EstimateRequest(
        prompt="a (red:1.6) circle", name="brieftest", out=str(tmp_path), use=Use.WHOLE, steps=6, sampling_steps=4,
        images=1, width=64, height=64, sentence=("a photo of {}",),
    )  # fmt: skip


def run(request: EstimateRequest, host: StandaloneHost) -> job.Outcome:
    *_, outcome = job.estimate(replace(request, overwrite=True), host)
    return outcome


@pytest.fixture(scope="module")
def known(plain):
    """What comes out without a card; one run of each request serves all modes."""
    outcomes: dict[EstimateRequest, job.Outcome] = {}

    def outcome(request: EstimateRequest) -> job.Outcome:
        key = replace(request, out="")
        if key not in outcomes:
            outcomes[key] = run(request, plain)
        return outcomes[key]

    return outcome


def tensors(host: StandaloneHost) -> Iterator[Tensor]:
    for network in host.parts.networks():
        yield from network.parameters()
        yield from network.buffers()


def state(host: StandaloneHost) -> list[tuple]:
    """Where everything is, what it holds, and what a run might leave behind."""
    weights = [(t.data_ptr(), t.requires_grad, t.double().sum().item(), t.isnan().any().item()) for t in tensors(host)]
    modules = [module for network in host.parts.networks() for module in network.modules()]
    left = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m), m.training, len(m._parameters))
        for m in modules
    ]
    return [*weights, *left]


# ---- the same result ----


@pytest.mark.parametrize(
    "what",
    [
        {"part": Part.AUTO},
        {"use": Use.ANYWHERE, "effort": Effort.QUICK},
        {"part": Part.UNET, "steps": 2, "trajectories": 1},
        {"part": Part.CROSS_ATTENTION, "vectors": "auto", "images": 0},
    ],
    ids=lambda what: next(iter(what.values())).value,
)
def test_placement_changes_nothing_but_where_weights_are(what, plain, carded, brief, known) -> None:
    request, before = replace(brief, **what), state(plain)
    wanted, given = known(request), run(request, carded)
    for key, rows in wanted.embedding.vectors.items():
        assert torch.equal(rows, given.embedding.vectors[key])
    assert given.fidelity.figures() == wanted.fidelity.figures()
    assert all(
        torch.equal(picture, given.fidelity.pictures[name]) for name, picture in wanted.fidelity.pictures.items()
    )
    assert state(carded) == before


def test_each_phase_has_what_it_needs_and_no_more(carded, brief) -> None:
    seen: dict[str, list[set[Network]]] = {}
    for progress in job.estimate(brief, carded):
        if isinstance(progress, Phase | StepReport):
            name = progress.part if isinstance(progress, StepReport) else progress.name
            seen.setdefault(name, []).append(carded.card.there())
    inside = {ATTENTION} if carded.mode is Offload.NETWORKS else set()
    unet, learning = {UNET} | inside, {TEXT, ATTENTION}
    wanted = {
        "Recording the target": unet, "Recording checks": unet, "cross-attention": learning,
        "Sketching the U-Net": unet, "sketch": learning, "unet and sketch": {TEXT, UNET, ATTENTION},
        "Pictures (prompt)": unet, "Noise": unet, "Pictures (unweighted)": unet, "Sentences": unet,
        "Pictures (embedding)": unet,
    }  # fmt: skip
    assert {name: there for name, (there, *_) in seen.items()} == wanted
    assert all(there == each[0] for each in seen.values() for there in each)


def test_the_pictures_are_decoded_with_the_vae_alone(carded, brief, monkeypatch) -> None:
    seen, decode = [], carded.parts.vae.decode
    monkeypatch.setattr(carded.parts.vae, "decode", lambda *a, **k: seen.append(carded.card.there()) or decode(*a, **k))
    run(brief, carded)
    assert seen == [{VAE}] * 3


def test_the_card_never_holds_more_than_the_largest_phase(carded, brief) -> None:
    room = carded.placement().room()
    carded.card.end()
    run(brief, carded)
    phases = [(TEXT, ATTENTION, UNET), (UNET,), (VAE,), (TEXT,)]
    block = room.block if carded.mode is Offload.BLOCKS else 0
    most = block + max(room.taken(carded.mode, phase) for phase in phases)
    assert carded.card.held == 0
    assert 0.8 * most <= carded.card.most <= most
    assert most < room.taken(Offload.OFF, ())
    assert room.block + room.taken(Offload.BLOCKS, (UNET,)) < 0.3 * room.taken(Offload.NETWORKS, (UNET,))


# ---- everything is back ----


@contextmanager
def calling(hook, module: nn.Module) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


MODULES = {  # phase -> what is placed, and a module that runs in it
    "target": ({TEXT}, lambda parts: parts.text_encoders[1].model),
    "recording": ({UNET}, lambda parts: blocks_of(parts.unet)[3]),
    "attention": ({TEXT, ATTENTION}, lambda parts: attention_modules(parts.unet)[2]),
    "polish": ({TEXT, ATTENTION, UNET}, lambda parts: parts.unet.mid_block),
    "pictures": ({VAE}, lambda parts: parts.vae.decoder),
}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.cuda.OutOfMemoryError])
@pytest.mark.parametrize("phase", MODULES)
def test_everything_is_back_after_an_error(phase, error, carded, brief) -> None:
    if carded.mode is Offload.NETWORKS and error is not RuntimeError:
        pytest.skip("block by block is the same way, and more")
    before, (placed, module_of) = state(carded), MODULES[phase]

    def fail(*_) -> None:
        if carded.card.placed == placed:
            raise error("somewhere inside")

    with calling(fail, module_of(carded.parts)), pytest.raises((error, OutOfMemory, ReportFailed)):
        run(brief, carded)
    assert state(carded) == before


@pytest.mark.parametrize("way", ["save", "discard"])
def test_everything_is_back_after_an_interrupt(way, carded, brief) -> None:
    before, cancel = state(carded), Cancel()
    try:
        for progress in job.estimate(brief, carded, cancel):
            if isinstance(progress, StepReport):
                getattr(cancel, way)()
    except job.Interrupted:
        assert way == "discard"
    assert state(carded) == before


def test_everything_is_back_when_the_card_is_full(carded, brief, monkeypatch) -> None:
    """Memory runs out in the middle of a network's way to the card."""
    before, to = state(carded), Tensor.to
    room = iter(range(300))

    def full(self, *given, **named):
        if named.get("copy") and next(room, None) is None:
            raise torch.cuda.OutOfMemoryError("full")
        return to(self, *given, **named)

    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(OutOfMemory, match="memory is full"):
        run(brief, carded)
    assert state(carded) == before


def test_out_of_memory_once_is_lived_with(carded, brief, known) -> None:
    """The U-Net's part goes on with less of it at once, and the placement with it."""
    request = replace(brief, part=Part.UNET, steps=2, trajectories=1)
    before, wanted = state(carded), known(request)
    ways, failed = (2 if carded.mode is Offload.NETWORKS else 1), []  # by blocks, activations are never kept

    def fail(*_) -> None:
        if carded.card.placed == {TEXT, UNET} and torch.is_grad_enabled() and len(failed) < ways:
            failed.append(1)
            raise torch.cuda.OutOfMemoryError

    with calling(fail, blocks_of(carded.parts.unet)[-1]):
        said = list(job.estimate(replace(request, overwrite=True), carded))
    assert any(isinstance(each, Note) and "Memory was short" in each.text for each in said)
    for key, rows in wanted.embedding.vectors.items():
        assert torch.allclose(rows, said[-1].embedding.vectors[key], atol=1e-4)
    assert state(carded) == before


# ---- the placement by itself ----


def test_forgetting_to_place_costs_time_alone(carded, plain) -> None:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    queries = torch.ones(1, 2, attention_modules(plain.parts.unet)[0].to_q.in_features)
    said: list[list[Tensor]] = []
    for host in (plain, carded):
        with host.session() as session, torch.no_grad():
            given = session.encode(["a red circle"])
            layer, eps = session.cross_attention()[0], session.predict_noise(x, torch.tensor([500]), given)
            said.append([given.hidden, eps, session.decode(x), layer(queries, given.hidden)])
            if host is carded:
                assert carded.card.there() == set(Network)
                session.place(TEXT)
                assert carded.card.there() == {TEXT}
    assert all(map(torch.equal, *said))


def test_the_gradient_brings_the_blocks_back_in(carded, plain) -> None:
    gradients = []
    for host in (carded, plain):
        with host.session() as session:
            session.place(TEXT)
            with torch.no_grad():
                given = session.encode(["a red circle"])
            session.place(UNET)
            hidden = given.hidden.clone().requires_grad_(True)
            x = torch.ones(2, 4, 8, 8)
            session.predict_noise(x, torch.tensor([500, 20]), Conditioning(hidden, given.pooled)).sum().backward()
            gradients.append(hidden.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().sum() > 0


def test_tied_weights_stay_tied_and_take_their_place_once() -> None:
    first, second, view = (nn.Linear(4, 4, bias=False) for _ in range(3))
    second.weight = first.weight
    view.weight = nn.Parameter(first.weight.data)  # another parameter over the same memory
    text = nn.ModuleList([first, second, view])
    card = Placement([text], nn.Linear(1, 1), nn.Linear(1, 1), CPU, Offload.NETWORKS)
    own = first.weight.data_ptr()
    card.place(TEXT)
    assert card.held == 4 * 4 * 4
    assert first.weight.data_ptr() == second.weight.data_ptr() == view.weight.data_ptr() != own
    card.end()
    assert first.weight.data_ptr() == view.weight.data_ptr() == own


def test_parameters_of_other_classes_are_left_alone() -> None:
    class Quantised(nn.Parameter):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = Quantised(layer.weight.data)
    own = layer.weight.data_ptr()
    card = Placement([layer], nn.Linear(1, 1), nn.Linear(1, 1), CPU, Offload.NETWORKS)
    card.place(TEXT)
    assert layer.weight.data_ptr() == own
    assert card.held == layer.bias.nbytes


def test_off_does_nothing(plain) -> None:
    before = state(plain)
    with plain.session() as session:
        session.place(VAE)
        with torch.no_grad():
            session.encode([HOLE])
        assert state(plain)[: len(list(tensors(plain)))] == [
            (pointer, False, total, nan) for pointer, _, total, nan in before[: len(list(tensors(plain)))]
        ]
        assert session.placement.held == 0


@pytest.mark.parametrize("chosen", [Offload.OFF, Offload.NETWORKS, Offload.BLOCKS])
def test_auto_is_decided_in_the_session(chosen, plain) -> None:
    host = CardHost.__new__(CardHost)
    host.__dict__ |= plain.__dict__ | {"mode": Offload.AUTO}
    before = state(host)
    with host.session() as session, torch.no_grad():
        given = session.encode(["a"])
        session.offload(chosen)
        session.place(UNET)
        session.predict_noise(torch.ones(1, 4, 8, 8), torch.tensor([5]), given)
        there = {Offload.OFF: set(Network), Offload.NETWORKS: {ATTENTION, UNET}, Offload.BLOCKS: {UNET}}
        assert host.card.there() == there[chosen]
        session.offload(Offload.OFF)
        assert host.card.mode is chosen
    assert state(host) == before


@pytest.mark.parametrize("mode", [Offload.NETWORKS, Offload.BLOCKS])
def test_the_command_lines_option_places(mode, folder, known, brief) -> None:
    host = aligned(StandaloneHost(ModelOptions(model=str(folder), device="cpu", offload=mode)))
    before = state(host)
    request = replace(brief, part=Part.UNET, steps=2, trajectories=1)
    wanted, given = known(request), run(request, host)
    assert all(torch.equal(rows, given.embedding.vectors[key]) for key, rows in wanted.embedding.vectors.items())
    assert state(host) == before
