"""The published layouts of Stable Diffusion 1, 2 and XL, for what a checkpoint's weights don't say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, Any] = json.loads(Path(__file__).with_name("layouts.json").read_text(encoding="utf-8"))
