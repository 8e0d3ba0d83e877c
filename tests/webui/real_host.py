"""A real webui for the tests: on the CPU, with a data folder of its own and one small checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
SHAPES_SD = PROJECT / "tests" / "shapes_sd" / "shapes_sd.safetensors"
# Of each webui those that it knows: some refuse to start at others.
FLAGS = (
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check", "--skip-version-check",
    "--skip-install", "--no-download-sd-model", "--do-not-download-clip", "--no-hashing", "--disable-nan-check",
    "--api", "--always-cpu", "--cpu", "--all-in-fp32", "--clip-in-fp32", "--vae-in-fp32", "--force-fp32",
    "--attention-pytorch",
)  # fmt: skip
FLAGS_OF_A1111 = ("--use-cpu", "all", "--no-half", "--precision", "full")  # in Forge's family they mean less
NAMED_IN = ("modules/cmd_args.py", "modules/paths_internal.py", "backend/args.py", "ldm_patched/modules/args_parser.py")
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GRADIO_ANALYTICS_ENABLED": "False",
    "OMP_NUM_THREADS": "1", "SD_WEBUI_RESTARTING": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
READY = "Startup time:"  # a request before this line stands in the log kills the webui
START_LIMIT = 600  # seconds


class RealHost:
    """`root`: the webui's checkout; `checkpoint`: a single file with its .yaml beside it; `launch`: what starts it, its
    own launch.py or something that does the same; `more`: flags of a test's own.

    Used as a context manager; `url` is where its page is.
    """

    def __init__(
        self, root: Path, python: Path, data: Path, checkpoint: Path, launch: Sequence[str], more: Sequence[str] = ()
    ) -> None:
        self.root, self.python, self.data, self.checkpoint = root, python, data, checkpoint
        self.launch, self.more = launch, more
        self.log = data / "log.txt"

    def _flags(self) -> list[str]:
        named = "".join(path.read_text(encoding="utf-8") for path in map(self.root.joinpath, NAMED_IN) if path.exists())
        known = [flag for flag in FLAGS if f'"{flag}"' in named or f"'{flag}'" in named]
        if "--always-cpu" not in known and "--cpu" not in known:
            known += FLAGS_OF_A1111
        folders = {"--data-dir": self.data, "--embeddings-dir": self.data / "embeddings"}
        folders["--gradio-allowed-path"] = self.root  # for the webui's own files, which are outside of the data folder
        return [*known, *(str(part) for pair in folders.items() for part in pair), *self.more]

    def __enter__(self) -> RealHost:
        self._lay_out()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {k: v for k, v in os.environ.items() if k != "COMMANDLINE_ARGS"} | ENVIRONMENT
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [self.python, *self.launch, *self._flags(), "--server-name", "127.0.0.1", "--port", str(port)],
                cwd=self.root, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + START_LIMIT
        while READY not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > until:
                self.__exit__()
                raise RuntimeError("The webui did not start:\n" + self.log.read_text(errors="replace")[-4000:])
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _lay_out(self) -> None:
        """The data folder: our extension, the one with the route, the checkpoint."""
        extensions, models = self.data / "extensions", self.data / "models" / "Stable-diffusion"
        for folder in (extensions / "checks" / "scripts", models, self.data / "embeddings"):
            folder.mkdir(parents=True, exist_ok=True)
        (extensions / "embedding-estimate").symlink_to(PROJECT, target_is_directory=True)
        shutil.copy(HERE / "check_route.py", extensions / "checks" / "scripts")
        (extensions / "checks" / "checks.json").write_text(json.dumps({"file": str(HERE / "checks.py")}))
        # Of the ways to preview SDXL, one that needs no download.
        settings = {"show_progress_type": "Approx cheap", "sd_model_checkpoint": self.checkpoint.name}
        (self.data / "config.json").write_text(json.dumps(settings))
        shutil.copy(self.checkpoint, models)
        layout = self.checkpoint.with_suffix(".yaml")
        vocabulary = layout.parent / "tokenizer"
        text = layout.read_text().replace("version: tokenizer", f"version: {vocabulary}")
        (models / layout.name).write_text(text)

    def run(self, check: str) -> dict[str, Any]:
        """The figures of a check; AssertionError with its trace where it failed."""
        request = urllib.request.Request(f"{self.url}/embedding-estimate-check/{check}", method="POST")
        with urllib.request.urlopen(request, timeout=900) as answer:
            result = json.load(answer)
        if "error" in result:
            raise AssertionError(result["error"])
        return result["figures"]
