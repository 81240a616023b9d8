"""A real browser for the tests of the pages: Debian's Chromium, driven by Playwright; what it is told."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DESKTOP, PHONE = (1280, 800), (390, 844)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--disable-component-update", "--no-first-run"),
)
#: Where the pictures of the documentation are written, if at all: FIRSTLIGHT_SHOTS=docs pytest ...
SHOTS = os.environ.get("FIRSTLIGHT_SHOTS")


@contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's browser; skips the test where this machine has none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine; install it with: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Seen:
    """All that a page was told by responses that have not been looked at yet, and what went wrong in it."""

    context: Any = None
    responses: list[Any] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self) -> list[tuple[str, bytes, float]]:
        """Address, all bytes (address, headers and body) and milliseconds to the first byte of each."""
        taken, self.responses[:] = list(self.responses), []
        return [(each.url, self._bytes(each), _waited(each)) for each in taken if each.url.startswith("http")]

    def _bytes(self, response: Any) -> bytes:
        told = "\n".join(f"{key}: {value}" for key, value in response.all_headers().items())
        body = b"" if 300 <= response.status < 400 else response.body()
        if not body and response.headers.get("content-type") == "image/png":
            # Chromium keeps no copy of what a script took as a blob: the same visitor asks once more.
            body = self.context.request.get(response.url).body()
        return f"{response.url}\n{told}\n\n".encode() + body


def _waited(response: Any) -> float:
    timing = response.request.timing
    return float(timing["responseStart"] - timing["requestStart"])


@contextmanager
def page_of(
    browser: Any, size: tuple[int, int], address: str, touch: bool = False
) -> Iterator[tuple[Any, Seen]]:
    """A page of a new visitor at `address`, and what it sees; fails for errors of its scripts."""
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=touch, accept_downloads=True
    )
    context.set_default_timeout(60_000)
    page, seen = context.new_page(), Seen(context)
    page.on("response", lambda response: seen.responses.append(response))
    page.on("pageerror", lambda error: seen.problems.append(str(error)))
    page.on("console", lambda said: seen.problems.append(said.text) if said.type == "error" else None)
    try:
        page.goto(address)
        yield page, seen
        assert seen.problems == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width  # nothing hangs over the edge
    finally:
        context.close()


def shoot(page: Any, name: str) -> None:
    """Takes a picture for the documentation, where that is asked for."""
    if SHOTS:
        page.wait_for_timeout(600)  # what moves has come to rest
        page.screenshot(path=str(Path(SHOTS) / name))


def permutation_test(ours: Sequence[float], theirs: Sequence[float], draws: int = 4_000) -> float:
    """Returns the p-value of the difference of two groups' mean ranks, two-sided.

    Ranks, so that a pause of the machine counts as one slow answer and no more.
    """
    both = np.array([*ours, *theirs])
    ranks = np.argsort(np.argsort(both, kind="stable"), kind="stable").astype(float)
    rng, n = np.random.default_rng(0), len(ours)

    def difference(order: np.ndarray) -> float:
        return abs(float(order[:n].mean() - order[n:].mean()))

    found = difference(ranks)
    as_far = sum(difference(rng.permutation(ranks)) >= found for _ in range(draws))
    return (as_far + 1) / (draws + 1)
