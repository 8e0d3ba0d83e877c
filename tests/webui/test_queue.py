"""The real webui's queue: estimates, pictures, other estimates, and a restart of its page in the middle of one."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from selenium.webdriver.common.by import By

from tests.interfaces import browser
from tests.interfaces.test_tab import use_few
from tests.webui.real_host import READY, RealHost
from tests.webui.test_browser import open_tab, progress

PICTURES = 20
OURS = "embedding-estimate/v1"
SHORT = {
    "prompt": "(red:1.6) circle", "use": "whole", "part": "unet", "sampling_steps": 4, "trajectories": 1, "images": 0,
    "width": 64, "height": 64, "overwrite": True, "vectors": 2,
}  # fmt: skip


def call(host: RealHost, path: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
    body = None if data is None else json.dumps(data).encode()
    request = urllib.request.Request(f"{host.url}/{path}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


def picture(host: RealHost, seed: int) -> str:
    drawn = {"prompt": "a red circle", "seed": seed, "steps": 3, "width": 64, "height": 64, "sampler_name": "Euler"}
    return call(host, "sdapi/v1/txt2img", drawn)["images"][0]


def until(host: RealHost, task: str, *states: str) -> dict[str, Any]:
    end = time.monotonic() + 300
    while time.monotonic() < end:
        told = call(host, f"{OURS}/progress/{task}")
        if told["state"] in states:
            return told
        time.sleep(0.2)
    raise AssertionError(f"the task is not {states}: {told}")


def test_pictures_and_an_estimate_at_once_are_all_answered_and_the_same(real_host: RealHost) -> None:
    alone = [picture(real_host, seed) for seed in range(PICTURES)]
    with ThreadPoolExecutor(PICTURES) as pool:
        task = call(real_host, f"{OURS}/estimate", {**SHORT, "name": "queued", "steps": 20})["id"]
        at_once = list(pool.map(lambda seed: picture(real_host, seed), range(PICTURES)))
    assert at_once == alone
    until(real_host, task, "done")
    assert call(real_host, f"{OURS}/result/{task}")["steps_run"] > 0


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="no chromium and chromedriver")
def test_a_second_estimate_waits_its_turn_and_says_so(real_host: RealHost, tmp_path) -> None:
    first = call(real_host, f"{OURS}/estimate", {**SHORT, "name": "first", "steps": 2000, "patience": 0})["id"]
    until(real_host, first, "running")
    with browser.page(real_host.url) as page:
        page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#tabs > .tab-nav > button"))
        open_tab(page, "Embedding Estimate")
        page.until(lambda: page.all("estimate")[0].is_displayed())
        page.fill("prompt", "a (red:1.6) circle")
        page.fill("name", "second")
        page.choose("use", "As the whole prompt")
        page.choose("part", "Transformer")
        page.tick("overwrite")
        use_few(page)
        page.click("estimate")
        page.until(lambda: "queue" in progress(page).lower() or "waiting" in progress(page).lower())
        page.shot(tmp_path / "waiting.png")
        assert call(real_host, f"{OURS}/progress/{first}")["state"] == "running"
        call(real_host, f"{OURS}/interrupt/{first}?how=discard", {})
        page.until(lambda: "Write second in your prompt" in page.text("result"), 300)


def test_a_restart_of_the_page_in_the_middle_of_a_run_leaves_nothing_behind(real_host: RealHost) -> None:
    """Apply and restart UI, which interrupts what is running: the best so far is saved, and nobody hears of it."""
    picture(real_host, 0)
    before = real_host.run("state")
    task = call(real_host, f"{OURS}/estimate", {**SHORT, "name": "reloaded", "steps": 2000, "patience": 0})["id"]
    end = time.monotonic() + 300
    while "Learning" not in call(real_host, f"{OURS}/progress/{task}")["words"] and time.monotonic() < end:
        time.sleep(0.1)
    starts = real_host.log.read_text(errors="replace").count(READY)
    real_host.run("restart")
    while real_host.log.read_text(errors="replace").count(READY) == starts and time.monotonic() < end:
        time.sleep(0.5)
    drawn = picture(real_host, 0)  # waits until the run is over
    after = real_host.run("state")
    assert before["embeddings"] != after["embeddings"]  # the word was saved, and is known
    changed = [key for key in before if before[key] != after[key] and key not in ("embeddings", "lookup")]
    assert not changed
    assert drawn == picture(real_host, 0)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        call(real_host, f"{OURS}/progress/{task}")
