"""The app in a real browser, headless: narrow and wide, light and dark, a deep link, errors in the console.

Skipped where Chromium or playwright is missing. Debian: `apt-get install chromium`; any system: set CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (
        path
        for name in (os.environ.get("CHROMIUM", ""), "chromium", "google-chrome")
        if name and (path := shutil.which(name))
    ),
    None,
)
if CHROMIUM is None:
    pytest.skip("no Chromium on the path (set CHROMIUM, or apt-get install chromium)", allow_module_level=True)
pytest.importorskip("streamlit")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 900}
VERDICT = "[data-testid='stAlert']"
BARS = ".js-plotly-plot .barlayer .point"
SECONDS = 60


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = _free_port()
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2).read()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert process.poll() is None, "streamlit ended before it answered"
                assert time.monotonic() < deadline, f"streamlit did not answer within {SECONDS} s"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(timeout=10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


def page_of(chromium: Any, address: str, viewport: dict[str, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """The page once its verdict and its bars are there, and what its console complained about."""
    page = chromium.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_timeout(SECONDS * 1000)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector(VERDICT)
    page.wait_for_selector(BARS)
    return page, complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_verdict_without_scrolling(server: str, chromium: Any, scheme: str) -> None:
    page, complaints = page_of(chromium, server, PHONE, scheme)
    box = page.locator(VERDICT).first.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] < PHONE["height"] / 2
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert complaints == []


def test_the_theme_follows_the_system(server: str, chromium: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page, _ = page_of(chromium, server, DESK, scheme)
        grounds.append(page.evaluate("getComputedStyle(document.querySelector('.stApp')).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(18, 22, 28)"]


def test_a_deep_link_opens_its_plan_and_a_control_rewrites_it(server: str, chromium: Any) -> None:
    page, complaints = page_of(chromium, f"{server}?model=gpt2&method=full&gpu=t4&seq=512&recompute=none", DESK)
    before = page.locator(VERDICT).first.inner_text()
    assert "Fits" in before
    page.get_by_role("radio", name="lora", exact=True).click()
    page.wait_for_function(
        "text => !document.querySelector(\"[data-testid='stAlert']\").innerText.includes(text)", arg=before
    )
    assert "method=lora" in page.url and "model=gpt2" in page.url
    assert complaints == []


def test_the_bars_are_there_for_those_who_do_not_see_them(server: str, chromium: Any) -> None:
    page, _ = page_of(chromium, server, DESK)
    assert page.get_by_text("peak_allocated").first.is_visible()
    assert page.get_by_role("table").first.is_visible()


def test_a_name_that_nobody_knows_keeps_the_last_answer(server: str, chromium: Any) -> None:
    page, complaints = page_of(chromium, server, DESK)
    before = page.locator(VERDICT).first.inner_text()
    model = page.get_by_role("combobox").first
    model.click()
    model.fill("Llama-9.9-8B")
    model.press("Enter")
    page.get_by_text("Not answered").wait_for()
    shown = page.locator(VERDICT).all_inner_texts()
    assert "Llama-9.9-8B" in shown[0] and before in shown
    assert complaints == []
