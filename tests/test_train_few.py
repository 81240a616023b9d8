"""End to end: a run that draws, and a student of it that draws in two steps without guidance."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train
from evaluation.adherence import AdherenceJudge, save_judge
from models.checkpoint import newest
from models.loading import load_pipeline
from models.registry import ConfigError
from models.stages import preflight
from models.stages.compute import Compute
from scripts.export import main as export
from tests.tiny_networks import NETWORKS

Command = Callable[..., int]
PARTS = (*NETWORKS, "rendered.images=16", "rendered.held_out=4")
DRAWING = (*PARTS, "name=drawing", "plan.autoencoder.images=8", "plan.diffusion.images=16")
FEW = (
    *PARTS, "experiment=landscapes_few", "name=few", "base=runs/drawing", "plan.distillation.images=32",
    "plan.distillation.batch_size=8", "plan.distillation.checkpoint_every_images=16",
    "plan.distillation.validate_every_images=16", "plan.distillation.warmup_images=0",
    "sampling.num_steps=2", "distillation.teacher_steps=2", "decoder.width=8", "decoder.blocks=1",
)  # fmt: skip
FIXED = Compute(torch.device("cpu"), False, True, False, "fixed by a test")


@pytest.fixture(autouse=True)
def _quick_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "decide", lambda *_: (FIXED, 0.01))
    monkeypatch.setattr(preflight, "matmul_ceiling", lambda _: 1e11)
    monkeypatch.setattr(train, "NORMALISATION_IMAGES", 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder all runs of this file are made in, with a judge that knows nothing."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    save_judge(AdherenceJudge(), folder / "runs" / "judge")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def drawing(place: Path, command: Command) -> Path:
    """The folder of a run that draws, made once."""
    folder = place / "runs" / "drawing"
    if not (folder / "report.json").exists():
        assert command("train", *DRAWING) == 0
    return folder


@pytest.fixture
def few(drawing: Path, command: Command) -> Path:
    """The folder of a student of it, made once."""
    folder = drawing.parent / "few"
    if not (folder / "report.json").exists():
        assert command("train", *FEW) == 0
    return folder


def test_a_student_is_trained_and_sampled(few: Path, command: Command, capsys: Any) -> None:
    report = json.loads((few / "report.json").read_text())
    assert report["images_seen"] == 32
    assert report["distillation_val_loss"] > 0
    last = newest(few / "distillation" / "checkpoints")
    assert last is not None
    assert last.document("config")["student"]["guidance_scale"] == 2.5
    line = json.loads((few / "distillation" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["val_decoder_psnr_db"] > 0
    words = ("checkpoint=runs/few", "prompt=a dawn", "num_images=2")
    assert command("sample", *words, "output=made") == 0
    record = json.loads(Path("made/00000.json").read_text())
    assert (record["num_steps"], record["guidance_scale"]) == (2, 1.0)
    assert record["checkpoint_sha256"] == last.sha256
    assert command("sample", *words, "output=whole", "full_decoder=true") == 0
    assert Path("made/00000.png").read_bytes() != Path("whole/00000.png").read_bytes()
    assert json.loads(Path("whole/00000.json").read_text())["full_decoder"] is True
    capsys.readouterr()
    assert command("train", *FEW) == 0
    assert "stage distillation: done, 32 images seen" in capsys.readouterr().out


def test_only_the_student_moves(few: Path, drawing: Path) -> None:
    mine, theirs = (newest(run / stage / "checkpoints") for run, stage in (
        (few, "distillation"), (drawing, "diffusion")))  # fmt: skip
    assert mine is not None
    assert theirs is not None
    one, other = mine.tensors("weights"), theirs.tensors("ema")
    moved = {key for key in other if not torch.equal(one[key], other[key])}
    assert moved
    assert all(key.startswith("backbone.") for key in moved)
    assert {key.partition(".")[0] for key in one.keys() - other.keys()} == {"decoder"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guidance_scale=3"], "guidance of 2.5 built in"),
        (["num_steps=5"], "a student of 2 steps"),
        (["grid=karras"], "a student of 2 steps"),
        (["sampler=heun"], "use sampler=euler"),
        (["negative_prompt=fog"], "guidance_scale is 1"),
        (["guide_checkpoint=runs/drawing"], "guidance built in"),
    ],
)
def test_a_student_does_what_it_was_taught(
    words: list[str], said: str, few: Path, command: Command, capsys: Any
) -> None:
    assert command("sample", "checkpoint=runs/few", "prompt=a dawn", *words) == 2
    assert said in capsys.readouterr().err


def test_a_teacher_has_no_small_decoder(drawing: Path, command: Command, capsys: Any) -> None:
    words = ("checkpoint=runs/drawing", "prompt=a dawn", "full_decoder=true")
    assert command("sample", *words) == 2
    assert "full_decoder has no effect" in capsys.readouterr().err


def test_an_exported_student_makes_the_same_pictures(few: Path) -> None:
    assert export([str(few), "few.safetensors"]) == 0
    run, _, sha256 = load_pipeline(few, torch.device("cpu"))
    file, _, same = load_pipeline(Path("few.safetensors"), torch.device("cpu"))
    assert sha256 == same
    one, other = (pipeline("a dawn over hills", seed=3)[0].tobytes() for pipeline in (run, file))
    assert one == other
    with pytest.raises(ConfigError, match="built in"):
        run("a dawn", guidance_scale=2.0)


@pytest.mark.slow
def test_a_stopped_student_goes_on_bit_for_bit(few: Path, command: Command, capsys: Any) -> None:
    other = few.parent.parent / "stopped"
    shutil.copytree(few.parent / "judge", other / "judge")
    shutil.copytree(few, other / "few")
    last = max((other / "few" / "distillation" / "checkpoints").glob("images-*"))
    shutil.rmtree(last)
    assert command("train", *FEW, "folder=stopped", "base=null", "resume=true") == 2
    assert "base is not set" in capsys.readouterr().err
    assert command("train", *FEW, "folder=stopped", "resume=true") == 0
    mine, theirs = (max((r / "distillation" / "checkpoints").glob("images-*")) for r in (other / "few", few))
    for file in ("weights", "ema", "optimizer"):
        one, wanted = (load_file(folder / f"{file}.safetensors") for folder in (mine, theirs))
        assert all(torch.equal(one[key], wanted[key]) for key in wanted), file


@pytest.mark.slow
def test_another_teacher_is_noticed(few: Path, drawing: Path, command: Command, capsys: Any) -> None:
    """The base was trained on since; its older checkpoint is still the teacher."""
    other = few.parent.parent / "later"
    for name in ("judge", "few", "drawing"):
        shutil.copytree(few.parent / name, other / name)
    shutil.rmtree(max((other / "few" / "distillation" / "checkpoints").glob("images-*")))
    state = max((other / "few" / "distillation" / "checkpoints").glob("images-*")) / "state.json"
    assert json.loads(state.read_text())["base"]
    more = ("plan.diffusion.images=24", "folder=later", "resume=true")
    assert command("train", *DRAWING, *more) == 0
    words = [word for word in FEW if not word.startswith("base=")]
    shutil.move(few.parent / "drawing", few.parent / "kept")
    shutil.copytree(other / "drawing", few.parent / "drawing")
    try:
        assert command("train", *words, "base=runs/drawing", "folder=later", "resume=true") == 4
        assert "was taught by another checkpoint" in capsys.readouterr().err
    finally:
        shutil.rmtree(few.parent / "drawing")
        shutil.move(few.parent / "kept", few.parent / "drawing")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["base=null"], 2, "base is not set"),
        (["base=runs/none"], 4, "there is no such run folder"),
        (["base=runs/few"], 4, "is a student itself"),
        (["stages=[diffusion,distillation]"], 2, "a run of its own"),
        (["sampling.guidance_scale=3"], 2, "set sampling.guidance_scale=1"),
        (["sampler=unipc"], 2, "sampler=euler"),
        (["grid=karras"], 2, "use grid=uniform or grid=warped"),
        (["distillation.teacher_steps=0"], 2, "teacher_steps is 0"),
        (["backbone.channels=[16,32]"], 4, "backbone.channels is [16, 16], here [16, 32]"),
        (["decoder.width=0"], 2, "must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], code: int, said: str, few: Path, command: Command, capsys: Any
) -> None:
    assert command("train", *FEW, "name=refused", *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (few.parent / "refused" / "distillation").exists()
