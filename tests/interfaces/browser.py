"""The tab in a real browser: Chromium, driven through Selenium."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,1600")


class Page:
    """The page with our tab; `inside` says which root our elements are below."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        driver.get(url)
        self.until(lambda: self.all("estimate"), 120)

    def all(self, name: str) -> list[WebElement]:
        return self.driver.find_elements(By.ID, f"embedding_estimate_{name}")

    def element(self, name: str, inside: str = "") -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, f"#embedding_estimate_{name} {inside}")

    def text(self, name: str) -> str:
        return self.element(name).get_attribute("textContent") or ""

    def fill(self, name: str, text: str) -> None:
        field = self.element(name, ":is(textarea, input)")
        field.clear()
        field.send_keys(text)

    def pick(self, name: str, word: str) -> None:
        """An entry of a menu that can be typed into."""
        self.until(lambda: self.element(name, "input").is_displayed())
        self.element(name, "input").send_keys(word, Keys.ENTER)

    def choose(self, name: str, word: str) -> None:
        """A radio button by its word."""
        for label in self.driver.find_elements(By.CSS_SELECTOR, f"#embedding_estimate_{name} label"):
            if label.text.strip() == word:
                label.click()
                return
        raise AssertionError(f"no {word} in {name}")

    def click(self, name: str) -> None:
        """Through the page, so that nothing that floats above can swallow it."""
        self.driver.execute_script("arguments[0].click()", self.all(name)[0])

    def tick(self, name: str) -> None:
        self.driver.execute_script("arguments[0].click()", self.element(name, "input[type=checkbox]"))

    def until(self, holds: Callable[[], object], seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not self._holds(holds):
            if time.monotonic() > end:
                raise AssertionError(
                    f"waited {seconds} s in vain; result: {self.all('result') and self.text('result')!r}"
                )
            time.sleep(0.1)

    @staticmethod
    def _holds(holds: Callable[[], object]) -> bool:
        try:
            return bool(holds())
        except WebDriverException:  # the element is just being replaced
            return False

    def complaints(self) -> list[str]:
        """Errors in the browser's console, but for files of other people that can't be loaded here."""
        severe = [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        return [said for said in severe if "Failed to load resource" not in said or "embedding" in said.lower()]

    def shot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def page(url: str) -> Iterator[Page]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield Page(driver, url)
    finally:
        driver.quit()
