"""`python -m tests.kill --runs 50`: kills runs of the command line at random moments, and at the worst ones, and looks
at what they leave. The folder must hold the old file or a new one, whole, and the next run must sweep up the rest.
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
    "--sentence", "a {}", "--width", "64", "--height", "64",
)  # fmt: skip
# A call of the system around which a run ends: (function of `os`, whether before or after it).
MOMENTS = (("fsync", True), ("fsync", False), ("link", True), ("link", False), ("replace", True), ("replace", False))


def child(arguments: list[str], prepare: Callable[[], None] = lambda: None) -> int:
    """Runs the command line in a process of its own, which has torch and the model already; its process id."""
    process = os.fork()
    if process:
        return process
    prepare()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
        os._exit(cli.main(arguments))


def ended(process: int) -> int:
    """Waits; the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def dies_at(call: str, before: bool) -> None:
    """From now on this process kills itself around a call of the system that concerns an embedding."""
    real = getattr(os, call)

    def deadly(*given, **more):
        if before:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*given, **more)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, call, deadly)


def killed(arguments: list[str], moment: tuple[str, bool] | float) -> bool:
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
    """Kills so many runs; how often what was left, and what the last, whole run couldn't sweep up."""
    parts, chance = StandaloneHost(ModelOptions(model=str(SHAPES_SD), device="cpu")).parts, random.Random(seed)
    standalone.checkpoint.load = lambda *_: parts
    arguments = [*REQUEST, "--out", str(folder), "--overwrite"]
    begun = time.monotonic()
    assert ended(child(arguments)) == 0
    whole = time.monotonic() - begun
    found: Counter[str] = Counter()
    path = folder / f"{NAME}.pt"
    for number in range(runs):
        old = None
        path.unlink(missing_ok=True)
        fresh = number % 2 == 0
        if not fresh:
            writing.save(Embedding(NAME, {"clip_l": torch.ones(1, 8)}, {"prompt": "old"}), path)
            old = path.read_bytes()
        planted = number % 3 == 2
        calls = [moment for moment in MOMENTS if moment[0] != ("replace" if fresh else "link")]
        moment = chance.choice(calls) if planted else chance.uniform(0, 0.95 * whole)
        found["killed" if killed(arguments[:-1] if fresh else arguments, moment) else "done before"] += 1
        found[look(folder, old)] += 1
        found["leftovers"] += any(each.name.startswith(".embedding") for each in folder.glob(".*"))
    path.unlink(missing_ok=True)
    assert ended(child(arguments[:-1])) == 0  # no refusal is left behind
    look(folder, None)
    left = [each.name for each in folder.iterdir() if each != path]
    assert not left, left
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
