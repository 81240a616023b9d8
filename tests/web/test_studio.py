"""The studio without a browser: bytes as `sample.py` makes them, requests refused, work that stops."""

import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.pictures import read_record
from tests.servers import wait_for
from tests.web.serving import Answer, Browser, serving
from web import painter as painting
from web import shelf as shelving
from web.album import Album
from web.painter import MAX_EACH, Order, Painter, Panel, State
from web.security import Buckets
from web.shelf import Place, Shelf
from web.studio import studio_part

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(
    make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("studio") / "runs"
    for seed, name in enumerate(("first", "second", "third")):
        make_run(folder / name, tiny_config, seed)
    (damaged,) = (folder / "third" / "diffusion").rglob("ema.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    return folder


@pytest.fixture
def runs(made: Path, tmp_path: Path) -> Path:
    """Two runs, and a damaged one."""
    return Path(shutil.copytree(made, tmp_path / "runs", symlinks=True))


@contextmanager
def studio(*places: str) -> Iterator[tuple[Browser, Painter]]:
    shelf = Shelf([Place.of(word) for word in places or ("runs",)], torch.device("cpu"))
    painter = Painter(shelf, Album(Path("album")))
    painter.look()
    painter.start()
    try:
        with serving([studio_part(painter)], visitors=Buckets(1e6, 1e6)) as site:
            yield site.browser(), painter
    finally:
        painter.stop()


def ready(browser: Browser) -> dict[str, dict[str, Any]]:
    """The checkpoints by name, once all have been read."""
    found: list[dict[str, Any]] = []

    def read() -> bool:
        found[:] = browser.get("/api/studio/checkpoints").json()["checkpoints"]
        return all(each["state"] != "unread" for each in found)

    wait_for(read, 60)
    return {each["name"]: each for each in found}


def events(answer: Answer) -> list[dict[str, Any]]:
    lines = answer.body.decode().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def paint(browser: Browser, **values: Any) -> list[dict[str, Any]]:
    """Asks, and returns all that is told until it has ended."""
    answer = browser.post("/api/studio/paint", values)
    assert answer.status == 202, answer.body
    return events(browser.get(f"/api/studio/events/{answer.json()['order']}"))


def posted(array: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_its_pictures_are_those_of_the_command_to_the_byte(runs: Path, command: Command) -> None:
    with studio() as (browser, painter):
        first = ready(browser)["runs/first"]
        told = paint(
            browser, checkpoints=[first["id"]], prompt=" a  sea ", negative_prompt="fog", num_images=3,
            seed=9, num_steps=4, guidance_scale=2.5, sampler="heun", grid="log_snr", size=[16, 32],
        )  # fmt: skip
        assert told[-1]["state"] == "done", told[-1]
        made = [painter.album.png(name) for name in told[-1]["pictures"][0]]
        words = ["num_images=3", "seed=9", "num_steps=4", "guidance_scale=2.5", "size=[16,32]"]
        words += ["sampler=heun", "grid=log_snr", "negative_prompt=fog", "prompt=a sea", "output=out"]
        assert command("sample", "checkpoint=runs/first", "device=cpu", *words) == 0
        assert made == [Path(f"out/0000{k}.png").read_bytes() for k in range(3)]

        own = paint(browser, checkpoints=[first["id"]], prompt="a sea", num_images=1)[-1]["pictures"][0][0]
        words = ["prompt=a sea", "num_images=1", "output=own"]
        assert command("sample", "checkpoint=runs/first", "device=cpu", *words) == 0
        assert painter.album.png(own) == Path("own/00000.png").read_bytes()
        download = browser.get(f"/studio/picture/{own}.png?download")
        assert download.headers["content-disposition"] == f'attachment; filename="{own}.png"'
        Path("download.png").write_bytes(download.body)
        record, intact = read_record(Path("download.png"))
        assert intact
        assert record["checkpoint_sha256"] == first["sha256"]
        assert command("sample", "verify=download.png") == 0


def test_a_mask_and_a_start_are_those_of_the_command(runs: Path, command: Command) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    mask = np.zeros((16, 16), np.uint8)
    mask[:, :6] = 255
    Image.fromarray(picture).save("picture.png")
    Image.fromarray(mask).save("mask.png")
    with studio() as (browser, painter):
        key = ready(browser)["runs/first"]["id"]
        base = {"checkpoints": [key], "prompt": "a sea", "num_images": 1, "image": posted(picture)}
        for output, values, words in (
            ("masked", {"mask": posted(mask)}, ["mask=mask.png"]),
            ("half", {"strength": 0.5}, ["strength=0.5"]),
            ("own", {}, []),
        ):
            told = paint(browser, **base, **values)[-1]
            words = [*words, "prompt=a sea", "num_images=1", "image=picture.png", f"output={output}"]
            assert command("sample", "checkpoint=runs/first", "device=cpu", *words) == 0
            assert painter.album.png(told["pictures"][0][0]) == (Path(output) / "00000.png").read_bytes()


def test_a_checkpoint_that_edits_takes_a_picture_and_an_instruction(
    make_run: Callable[..., Path], tiny_config: dict[str, Any], command: Command
) -> None:
    backbone = {**tiny_config["backbone"], "image_conditioning": True}
    make_run(Path("runs/edits"), {**tiny_config, "backbone": backbone}, 3)
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(picture).save("picture.png")
    with studio() as (browser, painter):
        offer = ready(browser)["runs/edits"]
        assert offer["edits"]
        asked = {"checkpoints": [offer["id"]], "prompt": "at night", "num_images": 2}
        told = paint(browser, **asked, image=posted(picture), image_guidance_scale=1.2)[-1]
        words = ["prompt=at night", "num_images=2", "image=picture.png", "image_guidance_scale=1.2"]
        assert command("sample", "checkpoint=runs/edits", "device=cpu", *words, "output=out") == 0
        made = [painter.album.png(name) for name in told["pictures"][0]]
        assert made == [Path(f"out/0000{k}.png").read_bytes() for k in range(2)]
        assert "give one with image" in paint(browser, **asked)[-1]["error"]
        refused = paint(browser, **asked, image=posted(picture), mask=posted(picture[:, :, 0]))[-1]
        assert "edits by instruction" in refused["error"]


def test_two_checkpoints_side_by_side_and_every_step(runs: Path) -> None:
    with studio() as (browser, painter):
        offers = ready(browser)
        keys = [offers[f"runs/{name}"]["id"] for name in ("first", "second")]
        told = paint(browser, checkpoints=keys, prompt="a sea", num_images=2, num_steps=30)
        last = told[-1]
        assert [len(names) for names in last["pictures"]] == [2, 2]
        records = [painter.album.record(name) for names in last["pictures"] for name in names]
        assert [r["checkpoint"] for r in records] == ["runs/first"] * 2 + ["runs/second"] * 2
        assert [(r["seed"], r["index"]) for r in records] == [(0, 0), (0, 1)] * 2
        seen = [each for each in told if each["previews"]]
        assert len(seen) >= 10
        assert all(len(each["previews"]) == 2 for each in seen)
        order = [(each["panel"], each["step"]) for each in seen]
        assert order == sorted(order)
        assert order[-1] == (1, 30)
        history = browser.get("/api/studio/history").json()["pictures"]
        assert [each["name"] for each in history] == sorted(chain(*last["pictures"]), reverse=True)
        assert history[0]["record"] == records[-1]
    assert len(Album(Path("album"))) == 4  # it is there after a restart


def test_a_damaged_checkpoint_is_listed_and_refused(runs: Path) -> None:
    with studio() as (browser, _):
        offers = ready(browser)
        third = offers["runs/third"]
        assert third["state"] == "damaged"
        assert "third" in third["problem"]
        answer = browser.post("/api/studio/paint", {"checkpoints": [third["id"]], "prompt": "a"})
        assert (answer.status, answer.json()["error"]) == (400, third["problem"])
        assert offers["runs/first"]["state"] == offers["runs/second"]["state"] == "ready"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"guidance_scale": 1e9}, "guidance_scale is"),
    ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ({"size": [15, 16]}, "size is 15"),
    ({"size": [1024, 16]}, "a side of at most 128"),
    ({"size": [128, 128], "num_images": 2}, "up to 1"),
    ({"strength": 0.5}, "there is no image to start from"),
    ({"guidance_scale": 10**400}, "guidance_scale must be a number"),
    ({"sampler": "x" * 2_000_000}, "sampler must be a name"),
    ({"num_steps": 0}, "num_steps must be a whole number"),
    ({"num_steps": True}, "num_steps must be a whole number"),
    ({"num_images": 17}, "num_images must be"),
    ({"seed": -1}, "seed must be"),
    ({"sampler": "huen"}, "did you mean 'heun'"),
    ({"prompt": "x" * 1001}, "at most 1,000 characters"),
    ({"prompt": 5}, "prompt must be"),
    ({"image": "%%"}, "base64"),
    ({"image": base64.b64encode(b"GIF89a").decode()}, "image/gif"),
    ({"checkpoints": []}, "1 to 2"),
    ({"checkpoints": ["../../etc"]}, "no such checkpoint"),
    ({"_target_": "os.system"}, "there is no option '_target_'"),
    ({"guidance": {"name": "refined"}}, "there is no option 'guidance'"),
]


def test_what_cannot_be_made_is_refused_in_one_line(runs: Path) -> None:
    with studio("runs/first") as (browser, painter):
        (offer,) = ready(browser).values()
        for values, said in REFUSED:
            asked = {"checkpoints": [offer["id"]], "prompt": "a sea", "num_images": 1, **values}
            answer = browser.post("/api/studio/paint", asked)
            if answer.status == 202:
                last = events(browser.get(f"/api/studio/events/{answer.json()['order']}"))[-1]
                assert last["state"] == "failed"
                error = last["error"]
            else:
                error = answer.json()["error"]
            assert said in error, values
            assert "\n" not in error
        assert len(painter.album) == 0


def test_a_name_is_no_path(runs: Path) -> None:
    Path("secret.png").write_bytes(b"secret")
    with studio("runs/first") as (browser, _):
        for name in ("..", "%2e%2e%2fsecret", "..%2fsecret", "secret", "*", ""):
            answer = browser.get(f"/studio/picture/{name}.png")
            assert answer.status == 404
            assert b"secret" not in answer.body


def test_an_order_stops_when_it_is_cancelled_or_nobody_watches(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(painting, "UNWATCHED_SECONDS", 0.3)
    with studio("runs/first") as (browser, painter):
        (offer,) = ready(browser).values()
        asked = {"checkpoints": [offer["id"]], "prompt": "a", "num_steps": 250, "num_images": 16}

        def start() -> Order:
            key = browser.post("/api/studio/paint", asked).json()["order"]
            return next(each for each in painter._orders.values() if each.key == key)

        left = start()  # nobody ever asks for its events
        wait_for(lambda: left.told.state is State.CANCELLED)
        assert left.told.step < 250
        order = start()
        with order.watch(lambda: None):
            wait_for(lambda: order.told.step > 2)
            assert browser.post("/api/studio/cancel", {"order": order.key}).status == 200
            wait_for(lambda: order.told.state is State.CANCELLED)
        assert order.told.step < 250
        assert len(painter.album) == 0


def test_the_queue_is_bounded_and_an_order_is_its_visitors_alone() -> None:
    painter = Painter(Shelf([], torch.device("cpu")), Album(Path("album")))  # never started: all waits
    for k in range(MAX_EACH):
        painter.submit(Order(f"a{k}", "a", []))
    with pytest.raises(OverflowError):
        painter.submit(Order("more", "a", []))
    painter.submit(Order("b", "b", []))
    with pytest.raises(KeyError):
        painter.order("a0", "b")
    first = painter.order("a0", "a")
    assert [painter.ahead(painter.order(key, v)) for key, v in (("a0", "a"), ("b", "b"))] == [1, 5]
    painter.cancel(first)
    assert first.told.state is State.CANCELLED
    painter.submit(Order("more", "a", []))


def test_a_painter_goes_on_after_a_failure_and_names_no_path_of_the_machine(runs: Path) -> None:
    def fails(source: object) -> Any:
        raise RuntimeError("somewhere: secret")

    shelf = Shelf([Place.of("runs/first")], torch.device("cpu"))
    painter = Painter(shelf, Album(Path("album")))
    painter.look()
    painter.start()
    try:
        key = shelf.offers()[0].id
        orders = [Order(str(k), "v", [Panel(key, fails)]) for k in range(2)]
        for order in orders:
            painter.submit(order)
        wait_for(lambda: all(order.told.state is State.FAILED for order in orders))
        assert "secret" not in orders[0].told.error
    finally:
        painter.stop()
    assert not any(thread.name == "painter" for thread in threading.enumerate())


def test_what_no_check_of_a_checkpoint_foresaw_ends_no_thread(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = shelving.load_pipeline

    def fails(path: Path, device: torch.device) -> Any:
        if path.name == "first":
            raise RuntimeError("secret: out of memory")
        return load(path, device)

    monkeypatch.setattr(shelving, "load_pipeline", fails)
    with studio("runs/first", "runs/second") as (browser, painter):
        offers = ready(browser)
        assert offers["runs/first"]["state"] == "damaged"
        assert "secret" not in offers["runs/first"]["problem"]
        monkeypatch.setattr(Shelf, "survey", lambda self: (_ for _ in ()).throw(PermissionError("no")))
        browser.get("/api/studio/checkpoints")
        asked = {"checkpoints": [offers["runs/second"]["id"]], "prompt": "a", "num_images": 1, "num_steps": 1}
        assert paint(browser, **asked)[-1]["state"] == "done"
        (order,) = painter._orders.values()
        assert order.panels == (), "the pictures it started from are kept"


def test_few_checkpoints_stay_in_memory_and_a_newer_one_is_loaded(
    runs: Path, make_run: Callable[..., Path], tiny_config: dict[str, Any]
) -> None:
    shelf = Shelf([Place.of("runs"), Place.of("again=runs/first")], torch.device("cpu"), kept=1)
    shelf.look()
    first, second = (shelf.offers()[k].id for k in (0, 1))
    source = shelf.get(first)
    assert shelf.get(first) is source
    shelf.get(second)
    assert len(shelf._loaded) == 1
    assert shelf.get(first) is not source
    assert shelf.get(first).sha256 == source.sha256
    make_run(Path("runs/first"), tiny_config, 7)  # a newer checkpoint, of other weights
    assert shelf.get(first).sha256 != source.sha256
    assert [offer.name for offer in shelf.offers()][-1] == "again"


def test_the_memory_of_an_album_is_bounded(tmp_path: Path) -> None:
    album = Album(tmp_path / "album", max_bytes=4_000)
    pictures = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    names = []
    for k, pixels in enumerate(pictures):
        names.append(album.add(pixels, {"index": k}))
        time.sleep(1e-3)
    assert sum(map(len, album._memory.values())) == album._bytes <= 4_000
    assert [json.loads((tmp_path / "album" / f"{name}.json").read_text())["index"] for name in names] == [
        *range(8)
    ]
    assert [record["index"] for _, record in album.latest(3, before=names[5])] == [4, 3, 2]
    assert len(album.png(names[0])) > 700
    (tmp_path / "album" / f"{names[1]}.png").write_bytes(b"damaged")
    assert dict(album.latest(8))[names[1]] == {}


def test_the_newest_pictures_stay_on_the_disk(tmp_path: Path) -> None:
    folder = tmp_path / "album"
    album = Album(folder, kept_bytes=3_500)  # a picture of noise weighs about 1,000
    (folder / 'mine".png').write_bytes(b"x" * 9_999)
    names = []
    for k in range(6):
        names.append(album.add(torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8), {"index": k}))
        time.sleep(1e-3)
    kept = names[-len(album) :]
    assert 1 < len(kept) < 6
    assert sorted(path.stem for path in folder.glob("*.json")) == kept
    assert sorted(path.stem for path in folder.glob("2*.png")) == kept
    assert sum((folder / f"{name}.png").stat().st_size for name in kept) <= 3_500
    assert (folder / 'mine".png').exists(), "it was made elsewhere"
    with pytest.raises(KeyError):
        album.png(names[0])
    assert [name for name, _ in Album(folder, kept_bytes=1).latest(9)] == names[-1:]
    with pytest.raises(KeyError):
        album.png('mine"')
