"""The tab in the real webui, used through a real browser: from the prompt to a picture made with the new name."""

from __future__ import annotations

from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.interfaces import browser
from tests.interfaces.test_tab import use_few
from tests.webui.real_host import RealHost

NAME = "webuiword"
SHOTS = "WEBUI_SHOTS"  # a folder to keep the screenshots in


def open_tab(page: browser.Page, title: str) -> None:
    for button in page.driver.find_elements(By.CSS_SELECTOR, "#tabs > .tab-nav > button"):
        if button.text.strip() == title:
            button.click()
            return
    raise AssertionError(f"no tab {title}")


def generate(page: browser.Page) -> str:
    """Presses txt2img's Generate; the address of the picture."""

    def pictures() -> list[str]:
        return [i.get_attribute("src") for i in page.driver.find_elements(By.CSS_SELECTOR, "#txt2img_gallery img")]

    before = pictures()
    page.driver.execute_script("document.getElementById('txt2img_generate').click()")
    page.until(lambda: pictures() and pictures() != before and "file=" in pictures()[0], 300)
    return pictures()[0]


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="no chromium and chromedriver")
def test_from_the_prompt_to_a_picture(real_host: RealHost, tmp_path) -> None:
    folder = real_host.data / "embeddings"
    with browser.page(real_host.url) as page:
        page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#tabs > .tab-nav > button"))
        open_tab(page, "Embedding Estimate")
        page.until(lambda: page.all("estimate")[0].is_displayed())
        page.shot(tmp_path / "empty.png")
        page.fill("prompt", "a (red:1.6) circle on a blue background")
        page.until(lambda: page.text("prompt_tokens").strip() in ("7/75 tokens", "? tokens"))  # ?: no model yet
        page.fill("name", NAME)
        page.choose("use", "As the whole prompt")
        page.choose("part", "U-NET")
        use_few(page)

        # An interrupt while nothing runs is forgotten. Then one that drops everything.
        page.click("discard")
        page.click("estimate")
        page.until(lambda: "Learning" in progress(page))
        page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#embedding_estimate_preview .livePreview img"))
        page.shot(tmp_path / "running.png")
        page.click("discard")
        page.until(lambda: "Nothing was saved" in page.text("result"))
        assert not list(folder.glob("*"))

        # One that saves; the page is closed and opened again meanwhile, and finds the run.
        page.click("estimate")
        page.until(lambda: "Learning" in progress(page))
        page.driver.refresh()
        page.until(lambda: "Learning" in progress(page))
        page.click("interrupt")
        page.until(lambda: f"Write {NAME} in your prompt" in page.text("result"), 300)
        assert (folder / f"{NAME}.pt").exists()
        assert (folder / f"{NAME}.preview.png").exists()
        assert NAME in (folder / f"{NAME}.json").read_text()

        # A taken name is refused, then overwritten; this one finishes.
        open_tab(page, "Embedding Estimate")
        page.until(lambda: page.all("estimate")[0].is_displayed())
        page.fill("prompt", "a (red:1.6) circle on a blue background")
        page.fill("name", NAME)
        page.choose("use", "As the whole prompt")
        use_few(page)
        page.click("estimate")
        page.until(lambda: "exists already" in page.text("result"))
        page.tick("overwrite")
        page.click("estimate")
        page.until(lambda: f"Write {NAME} in your prompt" in page.text("result"), 600)
        assert page.driver.find_elements(By.CSS_SELECTOR, "#embedding_estimate_gallery img")
        page.shot(tmp_path / "finished.png")

        # The name works in the very next generation.
        page.until(lambda: page.text("prompt_tokens").strip() == "7/75 tokens")
        page.click("send_txt2img_prompt")
        prompt = page.driver.find_element(By.CSS_SELECTOR, "#txt2img_prompt textarea")
        page.until(lambda: prompt.get_attribute("value") == NAME)
        generate(page)
        page.shot(tmp_path / "generated.png")
        assert not page.complaints()
    keep(tmp_path)


def progress(page: browser.Page) -> str:
    """The text of the webui's own progress bar over ours, also while another tab is open."""
    bars = page.driver.find_elements(By.CSS_SELECTOR, "#embedding_estimate_results .progress")
    return " ".join(bar.get_attribute("textContent") or "" for bar in bars)


def keep(shots: Path) -> None:
    import os
    import shutil

    if os.environ.get(SHOTS):
        for shot in shots.glob("*.png"):
            shutil.copy(shot, os.environ[SHOTS])


@pytest.mark.skipif(not (browser.CHROMIUM and browser.DRIVER), reason="no chromium and chromedriver")
def test_a_batch(real_host: RealHost, tmp_path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("batchday\ta (blue:1.5) square\nbatchbroken\t(a:1.5.2)\n", encoding="utf-8")
    with browser.page(real_host.url) as page:
        page.until(lambda: page.driver.find_elements(By.CSS_SELECTOR, "#tabs > .tab-nav > button"))
        open_tab(page, "Embedding Estimate")
        page.until(lambda: page.all("estimate")[0].is_displayed())
        page.choose("use", "As the whole prompt")
        page.choose("part", "Transformer")
        use_few(page)
        page.driver.execute_script(
            "arguments[0].querySelector('button, .label-wrap').click()", page.all("batch_fold")[0]
        )
        page.until(lambda: page.element("batch_file", "input[type=file]"))
        page.element("batch_file", "input[type=file]").send_keys(str(listed))
        page.until(lambda: "list" in page.text("batch_file"))
        page.click("batch_again")
        page.click("batch_estimate")
        page.until(lambda: "1 made, 1 failed" in page.text("result"), 300)
        page.shot(tmp_path / "batch.png")
        assert not page.complaints()
    assert (real_host.data / "embeddings" / "batchday.pt").exists()
