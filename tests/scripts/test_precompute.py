"""The command: what it stores is what training would have encoded, once, and never half of it."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.batch import Batch, Collate
from data.index import Index, IndexView
from data.moments import MomentsCollate, MomentsDataset, open_moments
from data.order import Order
from data.provenance import check_provenance, read_provenance
from data.shards import ShardDataset
from data.transforms import Decoder, ResizeCrop
from data.writer import write_shard
from models.loading import build_networks, load_pipeline
from models.registry import ConfigError, build
from models.stages.compute import Compute
from models.stages.diffusion import DiffusionStage
from models.stages.encoding import autoencoder_fingerprint, text_identity
from models.stages.optim import AdamW
from models.stages.plan import Plan
from scripts.precompute import main, parser, refuse_what_cannot_be_stored

PROJECT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MakeRun = Callable[..., Path]
CAPTIONS = ["dawn over the sea", "noon", "hills at night with many more words", "", "snow", "the moon"]


def picture(number: int) -> bytes:
    values = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(values).resize((32, 24), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of six pictures."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for n in range(3):
        samples = [
            (
                f"{i:05d}",
                {
                    "png": picture(i),
                    "txt": CAPTIONS[i % 6].encode() or b"a tree",
                    "json": b'{"number": %d}' % i,
                },
            )
            for i in range(6 * n, 6 * n + 6)
        ]
        write_shard(folder / f"{n:05d}.tar", samples)
    return folder


@pytest.fixture
def run(make_run: MakeRun, tiny_config: dict[str, Any], shards: Path, tmp_path: Path) -> Path:
    """A run whose data are those shards; its text encoder is trained."""
    data = {"shards": str(shards), "resolution": 16}
    return make_run(tmp_path / "run", tiny_config | {"run": {"seed": 0, "data": data}})


@pytest.fixture
def frozen(tiny_config: dict[str, Any], shards: Path, tmp_path: Path) -> dict[str, Any]:
    """A configuration with a frozen text encoder."""
    layers = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    tower = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": layers}
    (tmp_path / "tower.json").write_text(json.dumps(tower))
    text = {"name": "open_clip", "model": str(tmp_path / "tower.json"), "allow_random": True}
    data = {"shards": str(shards), "resolution": 16, "flip": True}
    return tiny_config | {
        "text_encoder": text | {"context_length": 12},
        "run": {"seed": 0, "data": data},
    }


def go(*words: object) -> int:
    try:
        return main([*map(str, words), "--workers", "0"])
    except SystemExit as stop:
        return int(stop.code or 0)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def stored(folder: Path) -> dict[str, np.ndarray]:
    view = IndexView(Index.open(str(folder)))
    data = MomentsDataset(view, Order(view.counts, 0), read_provenance(folder), 0, held_out=True)
    rows = data.__getitems__(list(range(len(data))))
    return dict(zip(rows.keys, rows.moments.numpy(), strict=True))


# --- what is stored -----------------------------------------------------------------------------------------


def test_it_stores_what_training_would_encode(run: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert go(run, out, "--batch-size", 4) == 0
    assert f"python train.py data.precomputed={out}" in capsys.readouterr().out
    found, view = stored(out), IndexView(Index.open(str(shards)))
    pictures = ShardDataset(view, Order(view.counts, 0), Decoder(), ResizeCrop(16), 0)
    autoencoder = load_pipeline(run, CPU)[0].autoencoder
    for sample in (pictures[i] for i in range(18)):
        with torch.no_grad():
            wanted = autoencoder.encode(sample.pixels[None].float() / 127.5 - 1)[0]
        assert np.allclose(found[sample.key], wanted.numpy(), rtol=1e-4, atol=1e-5)
    index = Index.open(str(out)).shard(1)
    assert [index.key(row) for row in range(6)] == [f"{i:05d}" for i in range(6, 12)]
    assert index.fields == ("json", "moments.npy", "txt")
    made = check_provenance(out, autoencoder_fingerprint(autoencoder), 16)
    assert made.shape == (8, 4, 4)
    assert (out / "skipped.jsonl").read_text() == ""


def test_moments_of_another_size_for_a_larger_run(run: Path, tmp_path: Path, capsys: Any) -> None:
    assert go(run, tmp_path / "out", "--resolution", 24) == 0
    made = read_provenance(tmp_path / "out")
    assert (made.preprocessing.resolution, made.shape) == (24, (8, 6, 6))
    assert next(iter(stored(tmp_path / "out").values())).shape == (8, 6, 6)
    capsys.readouterr()
    assert go(run, tmp_path / "other", "--resolution", 18) == 2
    assert "pictures of 18 pixels: no multiple of 4" in capsys.readouterr().err


def test_again_it_keeps_what_is_there(run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert go(run, out) == 0
    before, times = tars(out), [path.stat().st_mtime_ns for path in out.glob("*.tar")]
    assert go(run, out) == 0
    assert "3 of 3 shards, 3 of them from before" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in out.glob("*.tar")] == times
    (out / "00001.tar").unlink()
    assert go(run, out) == 0
    assert tars(out) == before


def test_an_interrupt_leaves_whole_shards(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from models.stages import encoding

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert go(run, whole, "--batch-size", 2) == 0
    real, calls = encoding.encode_images, []

    def pressed(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("scripts.precompute.encode_images", pressed)
    assert go(run, out, "--batch-size", 2) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    assert not list(out.glob("*.part"))
    assert go(run, out, "--batch-size", 2) == 0
    assert tars(out) == tars(whole)


def test_bad_pictures_are_left_out_and_named(run: Path, shards: Path, tmp_path: Path, capsys: Any) -> None:
    samples = [
        ("a", {"png": b"<html>", "txt": b"x"}),
        ("b", {"txt": b"x"}),
        ("c", {"png": picture(1), "txt": b"\xff"}),
    ]
    write_shard(shards / "00003.tar", samples)
    write_shard(shards / "00004.tar", [("d", {"png": picture(2)}), ("e", {"png": picture(3)[:-200]})])
    out = tmp_path / "out"
    assert go(run, out) == 0
    assert "4 left out" in capsys.readouterr().out
    entries = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["field"]) for entry in entries] == [
        ("a", "png"), ("b", "jpg"), ("c", "txt"), ("e", "png"),
    ]  # fmt: skip
    assert not (out / "00003.tar").exists()
    keys = [
        index.key(row) for index in map(Index.open(str(out)).shard, range(4)) for row in range(index.count)
    ]
    assert keys == [*(f"{i:05d}" for i in range(18)), "d"]
    assert check_provenance(out, read_provenance(out).autoencoder, 16)


def test_float16(run: Path, tmp_path: Path) -> None:
    assert go(run, tmp_path / "full") == 0
    assert go(run, tmp_path / "half", "--dtype", "float16") == 0
    full, half = stored(tmp_path / "full"), stored(tmp_path / "half")
    assert all(values.dtype == np.float16 for values in half.values())
    assert all(np.array_equal(half[key], values.astype(np.float16)) for key, values in full.items())


def test_numbers_too_large_for_float16_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        "scripts.precompute.encode_images", lambda _, pixels: torch.full((len(pixels), 8, 4, 4), 1e5)
    )
    assert go(run, tmp_path / "out", "--dtype", "float16") == 6
    assert "use --dtype float32" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


# --- training from it ---------------------------------------------------------------------------------------


def stage_of(config: dict[str, Any], run: Path) -> DiffusionStage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder, text_encoder, backbone = build_networks(config)
    averaged = load_pipeline(run, CPU)[0].autoencoder.state_dict()
    autoencoder.load_state_dict(averaged)
    compute = Compute(CPU, False, False, False, "in a test")
    plan = Plan(batch_size=4, images=16, warmup_images=0)
    objective = build("objective", config["objective"])
    return DiffusionStage(autoencoder, text_encoder, backbone, objective, 0.3, AdamW(2e-3), plan, compute, 0)


def losses(stage: DiffusionStage, batches: list[Batch]) -> list[float]:
    optimizer, found = stage.configure_optimizers(), []
    for batch in batches:
        loss = stage.mean_loss(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("with_text", [False, True])
def test_the_losses_are_those_of_training_from_pictures(
    with_text: bool, make_run: MakeRun, frozen: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    run, out = make_run(tmp_path / "run", frozen), tmp_path / "out"
    assert go(run, out, *["--text"][: int(with_text)]) == 0
    stage, other = stage_of(frozen, run), stage_of(frozen, run)
    text = text_identity(stage.text_encoder) if with_text else None
    made = check_provenance(out, autoencoder_fingerprint(stage._autoencoder[0]), 16, text, {"flip": True})
    assert made.preprocessing.variants == 2  # by itself, as the run mirrors
    tokenize = stage.text_encoder.tokenizer
    view = IndexView(Index.open(str(shards)))
    pictures = ShardDataset(view, Order(view.counts, 7), Decoder(), ResizeCrop(16, flip=True), 7)
    steps = [list(range(i, i + 4)) for i in range(0, 24, 4)]
    from_pictures = [Collate(tokenize)([pictures[i] for i in step]) for step in steps]
    train, _ = open_moments(str(out), 7, val_fraction=0.0, with_text=with_text)
    from_moments = [MomentsCollate(tokenize)(train.__getitems__(step)) for step in steps]
    assert [b.keys for b in from_moments] == [b.keys for b in from_pictures]
    assert all((b.text is not None) is with_text for b in from_moments)
    wanted = losses(stage, from_pictures)
    assert losses(other, from_moments) == pytest.approx(wanted, rel=1e-5)
    assert wanted[-1] != wanted[0]
    # The test can fail: without mirroring the losses are others.
    unmirrored = [MomentsCollate(tokenize)(_held_out(train).__getitems__(step)) for step in steps]
    assert losses(stage_of(frozen, run), unmirrored) != pytest.approx(wanted, rel=1e-3)


def _held_out(data: MomentsDataset) -> MomentsDataset:
    return MomentsDataset(
        data.view, data.order, data.reader.provenance, data.seed, data.with_text, held_out=True
    )


def test_validation_and_missing_captions_from_stored_text(
    make_run: MakeRun, frozen: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    from data.shards import MissingCaption

    write_shard(
        shards / "00003.tar", [("bare", {"png": picture(50)}), ("blank", {"png": picture(51), "txt": b" "})]
    )
    run, out = make_run(tmp_path / "run", frozen), tmp_path / "out"
    assert go(run, out, "--text") == 0
    view, moments = IndexView(Index.open(str(shards))), IndexView(Index.open(str(out)))
    keep = MissingCaption.UNCONDITIONAL
    pictures = ShardDataset(view, Order(view.counts, 0), Decoder(), ResizeCrop(16), 0, keep)
    data = MomentsDataset(
        moments, Order(moments.counts, 0), read_provenance(out), 0, True, True, missing_caption=keep
    )
    stage = stage_of(frozen, run)
    tokenize = stage.text_encoder.tokenizer
    one = Collate(tokenize)([pictures[i] for i in range(20)])
    two = MomentsCollate(tokenize)(data.__getitems__(list(range(20))))
    assert one.keys == two.keys
    assert two.text is not None
    assert {key for key, mask in zip(two.keys, two.text[1], strict=True) if not mask.any()} == {
        "bare",
        "blank",
    }
    (first,), (second,) = stage.validate([one]).values(), stage.validate([two]).values()
    assert torch.allclose(torch.as_tensor(first), torch.as_tensor(second), rtol=1e-5)


def test_stored_text_of_a_trained_encoder_is_refused(
    make_run: MakeRun, frozen: dict[str, Any], tmp_path: Path
) -> None:
    run, out = make_run(tmp_path / "run", frozen), tmp_path / "out"
    assert go(run, out, "--text") == 0
    train, _ = open_moments(str(out), 0, val_fraction=0.0, with_text=True)
    stage = stage_of(frozen, run)
    stage.text_encoder.requires_grad_(True)
    with pytest.raises(ValueError, match="this one is trained"):
        stage.mean_loss(MomentsCollate(stage.text_encoder.tokenizer)(train.__getitems__([0, 1])))


# --- refusals -----------------------------------------------------------------------------------------------


def test_another_autoencoder_into_the_same_folder_is_refused(
    run: Path, make_run: MakeRun, tiny_config: dict[str, Any], shards: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "out"
    assert go(run, out) == 0
    before = tars(out)
    config = tiny_config | {"run": {"seed": 0, "data": {"shards": str(shards), "resolution": 16}}}
    other = make_run(tmp_path / "other", config, 1)
    assert go(other, out) == 3
    said = capsys.readouterr().err.strip()
    prints = [autoencoder_fingerprint(load_pipeline(path, CPU)[0].autoencoder)[:12] for path in (run, other)]
    assert all(each in said for each in prints)
    assert said.count("\n") == 0
    assert tars(out) == before
    assert go(run, out, "--dtype", "float16") == 3
    assert "dtype float32, now it is float16" in capsys.readouterr().err
    with pytest.raises(Exception, match="moments are of autoencoder"):
        check_provenance(out, autoencoder_fingerprint(load_pipeline(other, CPU)[0].autoencoder), 16)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["{run}", "{tmp}/out", "--variants", "2"], 2, "would be equal"),
        (["{run}", "{tmp}/out", "--flip", "--variants", "1"], 2, "one variant has no flip"),
        (["{run}", "{tmp}/out", "--random-crop"], 2, "one variant has no random_crop"),
        (["{run}", "{tmp}/out", "--flip", "--variants", "3"], 2, "give an even number"),
        (["{run}", "{tmp}/out", "--variants", "0"], 2, "no whole number above 0"),
        (["{run}", "{tmp}/out", "--dtype", "bfloat16"], 2, "invalid choice"),
        (["{run}", "{tmp}/out", "--shards", "{tmp}/absent"], 3, "no such file or folder"),
        (["{run}", "{tmp}/out", "--text"], 4, "text encoder is trained along with the backbone"),
        (["{tmp}/absent", "{tmp}/out"], 4, "holds no verified autoencoder checkpoint"),
        (["{run}", "{tmp}/file"], 5, "exist"),
        (["{run}", "{run}/../shards"], 3, "made by something else"),
    ],
)
def test_errors_are_one_line(
    run: Path, tmp_path: Path, capsys: Any, words: list[str], code: int, said: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert go(*(word.format(run=run, tmp=tmp_path) for word in words)) == code
    error = capsys.readouterr().err.strip()
    assert said in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("options", "words", "said"),
    [
        ({"buckets": 4}, [], "of squares alone"),
        ({"sources": {"a": 1.0}, "shards": None}, [], "one by one: --shards SOURCE"),
        ({"captions": {"txt": 1.0, "json.long": 1.0}}, ["--text"], "chooses among txt, json.long"),
    ],
)
def test_data_options_that_would_be_ignored_are_refused(
    options: dict[str, Any], words: list[str], said: str
) -> None:
    args = parser().parse_args(["run", "out", *words])
    with pytest.raises(ConfigError, match=said):
        refuse_what_cannot_be_stored({"resolution": 16, **options}, args)
    refuse_what_cannot_be_stored({"buckets": 1, "sources": {}, "captions": {"txt": 1.0}}, args)


def test_an_unfinished_autoencoder_is_refused(
    make_run: MakeRun, tiny_config: dict[str, Any], shards: Path, tmp_path: Path, capsys: Any
) -> None:
    about = {
        "seed": 0,
        "data": {"shards": str(shards), "resolution": 16},
        "plan": {"autoencoder": {"images": 9}},
    }
    run = make_run(tmp_path / "run", tiny_config | {"run": about})
    assert go(run, tmp_path / "out") == 4
    assert "has seen 8 of 9 images" in capsys.readouterr().err


def test_an_exported_file_does_as_well(run: Path, tmp_path: Path) -> None:
    from models.loading import export

    export(run, tmp_path / "model.safetensors")
    assert go(run, tmp_path / "one") == 0
    assert go(tmp_path / "model.safetensors", tmp_path / "two") == 0
    assert tars(tmp_path / "one") == tars(tmp_path / "two")


# --- several processes, killed ------------------------------------------------------------------------------


def start(run: Path, out: Path, rank: int = 0, world_size: int = 1) -> "subprocess.Popen[str]":
    environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "scripts/precompute.py",
        str(run),
        str(out),
        "--workers",
        "1",
        "--batch-size",
        "1",
    ]
    return subprocess.Popen(
        command, cwd=PROJECT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_any_moment_it_goes_on(
    run: Path, shards: Path, tmp_path: Path, how: signal.Signals
) -> None:
    for n in range(3, 12):
        samples = [(f"{n}-{i}", {"png": picture(i), "txt": b"more"}) for i in range(40)]
        write_shard(shards / f"{n:05d}.tar", samples)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([str(run), str(whole), "--workers", "0", "--batch-size", "1"]) == 0
    process = start(run, out)
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.done.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], said
    assert "Traceback" not in said
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
    assert len(list(out.glob("*.done.json"))) < 12
    again = [start(run, out, rank, 2) for rank in range(2)]
    for each in again:
        _, said = each.communicate(timeout=120)
        assert each.returncode == 0, said
    assert tars(out) == tars(whole)
    assert not list(out.glob("*.part"))
    assert not list(out.glob("*.tar.lock"))
    assert check_provenance(out, read_provenance(out).autoencoder, 16)


def descendants(pid: int) -> list[int]:
    direct = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, direct) for each in (child, *descendants(child))]


@pytest.mark.slow
def test_workers_end_with_the_main_process(run: Path, shards: Path, tmp_path: Path) -> None:
    for n in range(3, 30):
        write_shard(shards / f"{n:05d}.tar", [(f"{n}-{i}", {"png": picture(i)}) for i in range(40)])
    process = start(run, tmp_path / "out")
    while not list((tmp_path / "out").glob("*.done.json")):
        time.sleep(0.01)
    children = descendants(process.pid)
    assert children
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
