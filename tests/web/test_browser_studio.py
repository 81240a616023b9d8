"""The studio in a real browser: prompt to picture, a mask drawn by hand, two checkpoints, history, download.

With FIRSTLIGHT_SHOTS=docs and FIRSTLIGHT_RUNS=FOLDER, a folder of trained runs, the slow test also takes the
picture of the documentation.
"""

import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import read_record
from tests.web.chromium import DESKTOP, PHONE, chromium, page_of, shoot
from tests.web.serving import serving
from web.album import Album
from web.painter import Painter
from web.security import Buckets
from web.shelf import Place, Shelf
from web.studio import PAGE, studio_part

PROMPT = "a clear dawn over the sea, the sun on the left"
#: Counts the previews that are shown, as a person would see them.
WATCH = """() => {
  window.previews = new Set();
  new MutationObserver((changes) => {
    for (const { target } of changes) if (target.src?.startsWith("data:")) previews.add(target.src);
  }).observe(document.getElementById("panels"), { subtree: true, attributeFilter: ["src"] });
}"""


@contextmanager
def studio(places: list[Place], album: Path) -> Iterator[tuple[str, Album]]:
    """A studio that is served: the address that opens it, and its finished pictures."""
    painter = Painter(Shelf(places, torch.device("cpu")), Album(album))
    painter.look()
    painter.start()
    try:
        with serving([studio_part(painter)], visitors=Buckets(1e6, 1e6)) as site:
            yield f"http://127.0.0.1:{site.port}/?token={site.access.token}", painter.album
    finally:
        painter.stop()


def is_ready(page: Any, count: int) -> None:
    """Waits until all checkpoints have been read."""
    page.locator("#checkpoint option").nth(count - 1).wait_for(state="attached")
    page.locator("#checkpoint option", has_text="being read").first.wait_for(state="detached")


def paint(page: Any, **values: Any) -> None:
    """Sets the form, paints, and waits for the end."""
    for key, value in values.items():
        page.locator(f"#{key}").fill(str(value))
    page.locator("#paint").click()
    page.locator("#cancel").wait_for()
    page.locator("#status", has_text=re.compile("^(Done|Cancelled)$")).wait_for()
    assert page.locator("#error").inner_text() == ""


def made(page: Any) -> list[str]:
    """Names of the pictures before the person, panel after panel."""
    cells = page.locator("#panels .cell[data-name]")
    return [str(cells.nth(k).get_attribute("data-name")) for k in range(cells.count())]


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def draw_a_mask(page: Any) -> tuple[float, float, float]:
    """Draws a stroke by mouse on the left half of the picture; returns its reach in shares of the picture."""
    canvas = page.locator("#canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = (lambda share: box["x"] + share * box["width"]), (lambda share: box["y"] + share * box["height"])
    page.mouse.move(x(0.2), y(0.2))
    page.mouse.down()
    page.mouse.move(x(0.25), y(0.5), steps=5)
    page.mouse.up()
    page.locator("#canvas-note", has_text="What is red is painted anew").wait_for()
    return 0.25, 0.2, 0.5


def prompt_to_picture(page: Any, album: Album, steps: int) -> str:
    """The name of a picture that was painted while its previews were seen, and downloaded."""
    page.evaluate(WATCH)
    paint(page, prompt=PROMPT, num_steps=steps, num_images=2, seed=5)
    assert page.evaluate("previews.size") >= min(steps, 4)
    names = made(page)
    assert [album.record(name)["index"] for name in names] == [0, 1]
    page.locator("#panels .cell").first.click()
    page.locator("#dialog[open]").wait_for()
    rows = page.locator("#record tr").all_inner_texts()
    assert "seed\t5" in rows
    assert f"prompt\t{PROMPT}" in rows
    with page.expect_download() as download:
        page.locator("#download").click()
    path = Path(download.value.path())
    record, intact = read_record(path)
    assert intact
    assert (record["prompt"], record["seed"], record["num_steps"]) == (PROMPT, 5, steps)
    assert path.read_bytes() == album.png(names[0])
    return names[0]


def mask_keeps_the_rest(page: Any, album: Album, name: str) -> None:
    """Paints over a stroke of the picture that is open: all else stays, to the bit."""
    page.locator("#start-from").click()
    page.locator("#editor").wait_for()
    page.locator("#brush-size").fill("12")
    right, _, _ = draw_a_mask(page)
    paint(page, num_images=1, seed=8)
    (painted,) = made(page)
    before, after = pixels(album.png(name)), pixels(album.png(painted))
    changed = (before != after).any(-1)
    assert changed.any()
    side = before.shape[1]
    # The brush reaches 6 % beyond its middle, and what is painted blends over four pixels beyond that.
    reach = int((right + 0.06) * side) + 6
    assert reach < side
    assert not changed[:, reach:].any()
    assert "mask_sha256" in album.record(painted)
    page.locator("#clear").click()
    page.locator("#remove").click()


def side_by_side(page: Any, album: Album) -> None:
    """Two checkpoints on the same seeds, and one picture's settings used again."""
    page.locator("#beside").select_option(index=2)
    paint(page, prompt=PROMPT, num_images=2, seed=11)
    records = [album.record(name) for name in made(page)]
    assert [(r["seed"], r["index"]) for r in records] == [(11, 0), (11, 1)] * 2
    assert len({r["checkpoint_sha256"] for r in records}) == 2
    assert page.locator("#panels .panel h2").count() == 2


def history_is_kept(page: Any, album: Album) -> None:
    """All that was painted is below, and its settings can be used again; also after a reload."""
    page.reload()
    for first in range(PAGE, len(album), PAGE):
        page.locator("#thumbnails li").nth(first - 1).wait_for()
        page.locator("#older").click()
    page.locator("#thumbnails li").nth(len(album) - 1).wait_for()
    assert page.locator("#thumbnails li").count() == len(album)
    is_ready(page, 2)
    page.locator("#thumbnails .cell").last.focus()
    page.keyboard.press("Enter")
    page.locator("#reuse").click()
    oldest: Mapping[str, Any] = album.latest(len(album))[-1][1]
    assert page.locator("#prompt").input_value() == oldest["prompt"]
    assert page.locator("#seed").input_value() == str(oldest["seed"])


def test_prompt_to_picture_in_a_browser(
    make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path
) -> None:
    for seed, name in enumerate(("first", "second")):
        make_run(tmp_path / "runs" / name, tiny_config, seed)
    places = [Place(tmp_path / "runs", "runs")]
    with chromium() as browser, studio(places, tmp_path / "album") as (address, album):
        with page_of(browser, DESKTOP, address) as (page, _):
            is_ready(page, 2)
            name = prompt_to_picture(page, album, 8)
            mask_keeps_the_rest(page, album, name)
            side_by_side(page, album)
            history_is_kept(page, album)
        with page_of(browser, (360, 740), address, touch=True) as (page, _):
            is_ready(page, 2)
            page.locator("#num_steps").fill("100")
            page.locator("#prompt").fill("<img src=x onerror=alert(1)>")
            page.locator("#num_images").fill("16")
            page.locator("#prompt").press("Control+Enter")
            page.locator("#status", has_text="Step").wait_for()
            page.locator("#cancel").click()
            page.locator("#status", has_text="Cancelled").wait_for()
            assert page.locator("#panels img[src=x]").count() == 0


@pytest.mark.slow
def test_a_trained_model_in_a_browser(tmp_path: Path) -> None:
    given = os.environ.get("FIRSTLIGHT_RUNS")
    if given is None:
        pytest.skip("FIRSTLIGHT_RUNS names no folder of trained runs")
    (run, *_) = sorted(path for path in Path(given).iterdir() if (path / "diffusion").is_dir())
    steps = sorted((run / "diffusion" / "checkpoints").glob("images-*"))
    places = [Place(run, f"runs/{run.name}"), Place(steps[0], "an earlier checkpoint")]
    with chromium() as browser, studio(places, tmp_path / "album") as (address, album):
        for size in (DESKTOP, PHONE):
            with page_of(browser, size, address) as (page, _):
                is_ready(page, 2)
                name = prompt_to_picture(page, album, 20)
                mask_keeps_the_rest(page, album, name)
                side_by_side(page, album)
                if size == DESKTOP:
                    for prompt in (
                        "a clear night over hills, the moon on the right",
                        "a cloudy noon over mountains",
                        "a clear dusk over the sea, the sun in the middle",
                    ):
                        paint(page, prompt=prompt, num_images=4, seed=3)
                    page.set_viewport_size({"width": 1280, "height": 940})
                    page.evaluate("scrollTo(0, 0)")
                    page.wait_for_load_state("networkidle")
                    shoot(page, "studio.png")
                    page.set_viewport_size({"width": DESKTOP[0], "height": DESKTOP[1]})
                history_is_kept(page, album)
