"""Becomes the script of an extension that the tests put beside ours: a route that runs one check in the webui."""

import importlib.util
import json
import sys
import traceback
from pathlib import Path

from fastapi.responses import JSONResponse
from modules import script_callbacks

CHECKS = json.loads((Path(__file__).parents[1] / "checks.json").read_text(encoding="utf-8"))["file"]


def add_route(_demo, app) -> None:
    @app.post("/embedding-estimate-check/{name}")
    def run(name: str) -> JSONResponse:
        try:
            return JSONResponse({"figures": _checks().CHECKS[name]()})
        except Exception:  # noqa: BLE001 (whatever it was, the test shows it)
            return JSONResponse({"error": traceback.format_exc()})


def _checks():
    if "embedding_estimate_checks" not in sys.modules:
        spec = importlib.util.spec_from_file_location("embedding_estimate_checks", CHECKS)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        sys.path.append(str(Path(CHECKS).parents[2]))  # for what the checks import of the tests
        spec.loader.exec_module(module)
    return sys.modules["embedding_estimate_checks"]


script_callbacks.on_app_started(add_route)
