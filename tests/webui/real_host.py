"""A real webui for the tests: on the CPU, with a data folder of its own and one small checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROJECT = HERE.parents[1]
SHAPES_SD = PROJECT / "tests" / "shapes_sd" / "shapes_sd.safetensors"
FLAGS = (
    "--skip-prepare-environment", "--skip-torch-cuda-test", "--skip-python-version-check", "--skip-version-check",
    "--use-cpu", "all", "--no-half", "--precision", "full", "--no-download-sd-model", "--do-not-download-clip",
    "--no-hashing", "--api", "--server-name", "127.0.0.1",
)  # fmt: skip
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "GRADIO_ANALYTICS_ENABLED": "False",
    "OMP_NUM_THREADS": "1", "SD_WEBUI_RESTARTING": "1",
}  # fmt: skip
READY = "Startup time:"  # a request before this line stands in the log kills the webui
START_LIMIT = 600  # seconds


class RealHost:
    """`root`: the webui's checkout; `checkpoint`: a single file with its .yaml beside it.

    Used as a context manager; `url` is where its page is.
    """

    def __init__(self, root: Path, python: Path, data: Path, checkpoint: Path = SHAPES_SD) -> None:
        self.root, self.python, self.data, self.checkpoint = root, python, data, checkpoint
        self.log = data / "log.txt"

    def __enter__(self) -> RealHost:
        self._lay_out()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environment = {k: v for k, v in os.environ.items() if k != "COMMANDLINE_ARGS"} | ENVIRONMENT
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [self.python, "launch.py", *FLAGS, "--data-dir", self.data, "--port", str(port)],
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
        (self.data / "config.json").write_text(json.dumps({"show_progress_type": "Approx cheap"}))
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
