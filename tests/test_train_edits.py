"""End to end: a run that draws, and one that begins with it and learns to edit by instruction."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from evaluation.adherence import AdherenceJudge, save_judge
from models.checkpoint import fingerprint, newest, save_checkpoint
from models.loading import load_pipeline, read_sampling
from models.sampling import Job
from models.stages import preflight
from models.stages.compute import Compute
from tests.tiny_networks import NETWORKS

Command = Callable[..., int]
PARTS = (*NETWORKS, "rendered.images=16", "rendered.held_out=4")
DRAWING = (*PARTS, "name=drawing", "plan.autoencoder.images=8", "plan.diffusion.images=16")
EDITING = (
    *PARTS, "experiment=landscapes_edits", "name=editing", "base=runs/drawing", "plan.diffusion.images=32",
    "plan.diffusion.checkpoint_every_images=16", "plan.diffusion.validate_every_images=16",
    "plan.diffusion.warmup_images=0", "optimizer.diffusion.lr=2e-2",
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
def editing(drawing: Path, command: Command) -> Path:
    """The folder of a run that learnt to edit on top of it, made once."""
    folder = drawing.parent / "editing"
    if not (folder / "report.json").exists():
        assert command("train", *EDITING) == 0
    return folder


def test_a_run_that_edits_is_trained_and_measured(editing: Path) -> None:
    report = json.loads((editing / "report.json").read_text())
    figures = report["editing"]
    assert figures["edits"] == 4
    assert 0 <= figures["changed"] <= 1
    assert set(figures["kept"]) == {"time", "terrain", "light", "sky"}
    assert figures["doing_nothing"]["unedited_error"] == 0
    assert report["images_seen"] == 32
    with Image.open(editing / "before.png") as picture:
        assert picture.size == (32, 32)
    assert (editing / "contact_sheet.png").exists()
    assert [p.name for p in sorted((editing / "diffusion" / "pictures").iterdir())] == [
        "000000000016.png", "000000000032.png",
    ]  # fmt: skip


def test_the_run_is_whole_without_its_base(drawing: Path, editing: Path) -> None:
    mine, theirs = (newest(run / "autoencoder" / "checkpoints") for run in (editing, drawing))
    assert mine is not None
    assert theirs is not None
    assert fingerprint(mine.tensors("ema")) == fingerprint(theirs.tensors("ema"))
    base = newest(drawing / "diffusion" / "checkpoints")
    last = newest(editing / "diffusion" / "checkpoints")
    assert last is not None
    assert base is not None
    assert last.document("state")["base"] == mine.document("state")["base"] == base.sha256
    pipeline, config, _ = load_pipeline(editing, torch.device("cpu"))
    before = torch.full((3, 32, 32), 90, dtype=torch.uint8)
    jobs = [Job("make it night", 0, before=before), Job("make it night", 0, before=255 - before)]
    made = pipeline.generate(jobs, read_sampling(config))
    assert made.shape == (2, 3, 32, 32)
    assert not torch.equal(made[0], made[1]), "the picture is not looked at"


def test_it_goes_on_bit_for_bit_without_the_base(editing: Path, command: Command) -> None:
    """A resumed run is told no base; one that lost its first checkpoint needs it again."""
    other = editing.parent.parent / "stopped"
    shutil.copytree(editing.parent / "judge", other / "judge")
    shutil.copytree(editing, other / "editing")
    run, words = other / "editing", [word for word in EDITING if not word.startswith("base=")]
    shutil.rmtree(max((run / "diffusion" / "checkpoints").glob("images-*")))
    assert command("train", *words, "base=null", "folder=stopped", "resume=true") == 0
    mine, theirs = (max((r / "diffusion" / "checkpoints").glob("images-*")) for r in (run, editing))
    for file in ("weights", "ema", "optimizer"):
        one, wanted = (load_file(folder / f"{file}.safetensors") for folder in (mine, theirs))
        assert all(torch.equal(one[key], wanted[key]) for key in wanted), file
    states = [json.loads((folder / "state.json").read_text())["base"] for folder in (mine, theirs)]
    assert states[0] == states[1]


def test_a_run_without_its_first_checkpoint_asks_for_the_base(
    editing: Path, command: Command, capsys: Any
) -> None:
    other = editing.parent.parent / "early"
    shutil.copytree(editing.parent / "judge", other / "judge")
    shutil.copytree(editing / "autoencoder", other / "editing" / "autoencoder")
    words = [word for word in EDITING if not word.startswith("base=")]
    assert command("train", *words, "base=null", "folder=early", "resume=true") == 4
    assert "give the same base=... again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["base=runs/none"], 4, "there is no such run folder or file"),
        (["backbone.channels=[16,32]"], 4, "backbone.channels is [16, 16], here [16, 32]"),
        (["autoencoder.channels=[8,8]"], 4, "autoencoder.channels is [8], here [8, 8]"),
        (["stages=[autoencoder]"], 2, "add diffusion"),
        (["data.before=''"], 2, "set both or neither"),
        (["backbone.image_conditioning=false"], 2, "set both or neither"),
        (["conditioning_dropout=0.8"], 2, "at most 2/3"),
        (["data.before=second"], 2, "must be one of before"),
        (["data.precomputed=x"], 2, "leave out one"),
    ],
)
def test_what_cannot_be_is_refused(
    words: list[str], code: int, said: str, drawing: Path, command: Command, capsys: Any
) -> None:
    assert command("train", *EDITING, "name=refused", *words) == code
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (drawing.parent / "refused" / "autoencoder").exists()


def test_another_base_is_noticed(editing: Path, command: Command, capsys: Any) -> None:
    assert command("train", *EDITING, "base=runs/other") == 4
    assert "base was runs/drawing, now runs/other" in capsys.readouterr().err


def test_a_run_of_its_own_takes_no_base(drawing: Path, command: Command, capsys: Any) -> None:
    """The folder holds another autoencoder than the base's."""
    theirs = newest(drawing / "autoencoder" / "checkpoints")
    assert theirs is not None
    moved = {key: tensor + 0.01 for key, tensor in theirs.tensors("ema").items()}
    documents = {name: theirs.document(name) for name in ("config", "state")}
    other = drawing.parent / "mixed" / "autoencoder" / "checkpoints"
    save_checkpoint(other, 8, {"ema": moved, "weights": moved}, documents)
    assert command("train", *EDITING, "name=mixed") == 4
    assert "is another autoencoder than that of base=runs/drawing" in capsys.readouterr().err


def test_ordinary_fine_tuning(drawing: Path, command: Command, capsys: Any) -> None:
    """Both stages are asked for; the autoencoder is taken, the rest begins where the base ended."""
    words = [word for word in DRAWING if not word.startswith("name=")]
    assert command("train", *words, "name=finer", "base=runs/drawing", "plan.diffusion.images=8") == 0
    assert "stage autoencoder: done, taken from the base" in capsys.readouterr().out
    mine, theirs = (
        newest(drawing.parent / name / "diffusion" / "checkpoints") for name in ("finer", "drawing")
    )
    assert mine is not None
    assert theirs is not None
    one, other = mine.tensors("weights"), theirs.tensors("ema")
    moved = max((one[key] - other[key]).abs().max().item() for key in one)
    assert 0 < moved < 0.05
