"""`python -m tests.kill --runs 50`: kills runs of the command line at random moments, and at the worst ones, and looks
at what they leave. The folder must hold the old file or a new one, whole; --resume must come to the vectors of a run
that nobody killed; and the next run must sweep up the rest.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from lib_estimate.files import reading, writing
from lib_estimate.files.embedding import Embedding
from lib_estimate.hosts import standalone
from lib_estimate.hosts.standalone import StandaloneHost
from lib_estimate.interfaces import cli
from lib_estimate.request import ModelOptions
from tests.conftest import SHAPES_SD

NAME = "word"
REQUEST = (
    "fit", "a (red:1.6) circle", "--model", str(SHAPES_SD), "--device", "cpu", "--name", NAME,
    "--part", "transformer", "--steps", "5", "--images", "0", "--sampling-steps", "4", "--trajectories", "1",
    "--sentence", "a {}", "--width", "64", "--height", "64", "--checkpoint-every", "1",
)  # fmt: skip
# Around which call of the system a run ends. The state of the run is written by `replace`, so that comes several times.
CALLS = ("fsync", "link", "replace")
MOST_CALLS = 6


def child(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Runs the command line in a process of its own, which has torch and the model already; its process id."""
    process = os.fork()
    if process:
        return process
    prepare()
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere.fileno(), stream.fileno())
        os._exit(cli.main(arguments))


def ended(process: int) -> int:
    """Waits; the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dies_at(call: str, before: bool, count: int) -> None:
    """From now on this process kills itself before or after it has called the system so many times."""
    real, left = getattr(os, call), [count]

    def deadly(*given, **more):
        left[0] -= 1
        if before and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*given, **more)
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, deadly)


def killed(arguments: list[str], moment: tuple[str, bool, int] | float) -> bool:
    """Runs and kills, after so many seconds or around a call; False where the run was done before."""
    if isinstance(moment, tuple):
        return ended(child(arguments, lambda: dies_at(*moment))) < 0
    process = child(arguments)
    time.sleep(moment)
    os.kill(process, signal.SIGKILL)
    return ended(process) < 0


def look(folder: Path, old: bytes | None) -> str:
    """What a killed run has left: "old", "new" or "nothing". AssertionError where that is not whole."""
    path = folder / f"{NAME}.pt"
    seen = [each.name for each in folder.iterdir() if not each.name.startswith(".")] if folder.exists() else []
    if not path.exists():
        assert (seen, old) == ([], None)
        return "nothing"
    assert seen == [path.name], seen
    if path.read_bytes() == old:
        return "old"
    embedding = reading.load(path)
    assert embedding.metadata["prompt"] == REQUEST[1]
    assert torch.isfinite(embedding.vectors["clip_l"]).all()
    return "new"


def run(runs: int, seed: int, folder: Path) -> dict[str, int]:
    """Kills so many runs; how often what was left."""
    parts, chance = StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu")).parts, random.Random(seed)
    standalone.checkpoint.load = lambda *_: parts
    arguments = [*REQUEST, "--out", str(folder)]
    path = folder / f"{NAME}.pt"
    begun = time.monotonic()
    assert ended(child(arguments)) == 0
    whole, wanted = time.monotonic() - begun, reading.load(path).vectors["clip_l"]
    found: Counter[str] = Counter()
    for number in range(runs):
        old = None
        path.unlink(missing_ok=True)
        if number % 2:
            writing.save(Embedding(NAME, {"clip_l": torch.ones(1, 8)}, {"prompt": "old"}), path)
            old = path.read_bytes()
        moment = chance.uniform(0, 0.9 * whole)
        if number % 4 > 1:
            call = chance.choice(CALLS)
            moment = (call, chance.random() < 0.5, 1 if call != "replace" else chance.randint(1, MOST_CALLS))
        given = arguments if old is None else [*arguments, "--overwrite"]
        found["killed" if killed(given, moment) else "done before"] += 1
        left = look(folder, old)
        found[left] += 1
        found["with leftovers"] += any(folder.glob(".embedding*"))
        if left != "new":
            found["gone on with from a state"] += any(folder.glob("*.run"))
            assert ended(child([*given, "--resume"])) == 0  # no refusal is left behind
            assert torch.equal(reading.load(path).vectors["clip_l"], wanted)
            found["gone on with to the same vectors"] += 1
            assert os.listdir(folder) == [path.name]
    path.unlink(missing_ok=True)
    assert ended(child(arguments)) == 0
    assert os.listdir(folder) == [path.name]
    return dict(found) | {"milliseconds of a whole run": round(1000 * whole)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)  # what is forked can't share a pool of threads
    with tempfile.TemporaryDirectory() as folder:
        for what, count in run(given.runs, given.seed, Path(folder) / "embeddings").items():
            sys.stdout.write(f"{what}: {count}\n")


if __name__ == "__main__":
    main()
