"""End to end: one command trains and reports, again trains nothing, and a stopped run goes on bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import evaluation.report
import train
from evaluation.adherence import AdherenceJudge, save_judge
from models.checkpoint import newest
from models.stages import ahead, preflight
from models.stages.callbacks import Clock
from models.stages.compute import Compute, threads_for
from models.stages.diffusion import DiffusionStage
from models.stages.lock import run_lock
from scripts.export import main as export
from scripts.precompute import main as precompute
from tests.tiny_networks import NETWORKS, PLAN, SHORT

PROJECT = Path(__file__).resolve().parents[1]
Command = Callable[..., int]
WORDS = ("name=tiny", "rendered.images=24", "rendered.held_out=4", *NETWORKS, *PLAN)
#: Two fresh runs may time the ways to compute differently; this is the one for all of them here.
FIXED = Compute(torch.device("cpu"), False, True, False, "fixed by a test")
#: The same for another process, which is killed in the step after 48 images: 16 past the checkpoint.
KILLED = """
import os, signal, sys, time, torch
import train
from conf.cli import main
from models.stages import preflight
from models.stages.compute import Compute
from models.stages.diffusion import DiffusionStage
preflight.decide = lambda *_: (Compute(torch.device("cpu"), False, True, False, "fixed by a test"), 0.01)
train.NORMALISATION_IMAGES = 24
mean_loss = DiffusionStage.mean_loss
def killing(self, batch):
    if self.images_seen == 48:
        time.sleep(1)  # the checkpoint of 32 images is written meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    return mean_loss(self, batch)
DiffusionStage.mean_loss = killing
main("train", train.train)
"""
NO_LIGHTNING = """
import runpy, sys
runpy.run_path("sample.py", run_name="__main__")
heavy = {"lightning", "wandb", "open_clip", "webdataset"} & {name.split(".")[0] for name in sys.modules}
print("imported:", sorted(heavy))
"""


@pytest.fixture(autouse=True)
def _quick_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "decide", lambda *_: (FIXED, 0.01))
    monkeypatch.setattr(preflight, "matmul_ceiling", lambda _: 1e11)
    monkeypatch.setattr(train, "NORMALISATION_IMAGES", 24)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder all runs of this file are made in, with a judge that knows nothing."""
    folder, before = tmp_path_factory.mktemp("place"), Path.cwd()
    save_judge(AdherenceJudge(), folder / "runs" / "judge")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture
def first(place: Path, command: Command) -> Path:
    """The folder of an uninterrupted run, made once."""
    folder = place / "runs" / "tiny"
    if not (folder / "report.json").exists():
        assert command("train", *WORDS) == 0
    return folder


#: In place of the minute that training a judge takes.
QUICK_JUDGE = f"""import sys; sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
from pathlib import Path
import evaluation.report
from evaluation.adherence import AdherenceJudge, save_judge
save_judge(AdherenceJudge(), Path(sys.argv[1]))"""


@pytest.mark.parametrize("cores", [1, 2])
def test_the_judge_is_trained_beside_where_a_core_is_idle(
    cores: int, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "JUDGE", (sys.executable, "-c", QUICK_JUDGE))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    in_the_report: list[int] = []

    def train_judge(seed: int, progress: Any) -> tuple[AdherenceJudge, dict[str, float]]:
        in_the_report.append(seed)
        return AdherenceJudge(), {}

    monkeypatch.setattr(evaluation.report, "train_judge", train_judge)
    assert command("train", *WORDS, *SHORT, f"folder=judged-{cores}") == 0
    assert (place / f"judged-{cores}" / "judge" / "judge.json").exists()
    assert in_the_report == ([0] if cores == 1 else [])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (["/nowhere"], "No such file"),
        ([sys.executable, "-c", "import sys; sys.exit(7)"], "exit code 7"),
        ([sys.executable, "-c", "import time; time.sleep(600)"], "not done after 0.1 s"),
    ],
)
def test_a_judge_that_cannot_be_trained_beside_is_trained_for_the_report(
    program: list[str], said: str, place: Path, command: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(train, "JUDGE", program)
    monkeypatch.setattr(train, "JUDGE_PATIENCE", 0.1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(evaluation.report, "train_judge", lambda seed, progress: (AdherenceJudge(), {}))
    folder = f"misjudged-{len(said)}"
    assert command("train", *WORDS, *SHORT, f"folder={folder}") == 0
    assert said in capsys.readouterr().out
    assert (place / folder / "judge" / "judge.json").exists()


def document(run: Path, name: str) -> Any:
    """What the newest checkpoint of the diffusion stage says."""
    last = newest(run / "diffusion" / "checkpoints")
    assert last is not None
    return last.document(name)


def test_a_stage_keeps_its_threads(place: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the preflight that began the run, whatever another one would decide: or the last bits change."""
    save_judge(AdherenceJudge(), place / "threads" / "judge")
    words, decided = [*WORDS, *SHORT, "folder=threads", "trainer.threads=0"], {"flops": 2e9}
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(
        preflight, "threads_for", lambda options, _, before=0: threads_for(options, decided["flops"], before)
    )
    seen: list[int] = []
    real = DiffusionStage.training_step
    monkeypatch.setattr(
        DiffusionStage, "training_step", lambda *given: seen.append(torch.get_num_threads()) or real(*given)
    )
    try:
        assert command("train", *words) == 0
        assert set(seen) == {2}
        run = place / "threads" / "tiny"
        assert document(run, "state")["compute"]["threads"] == 2
        shutil.rmtree(run / "diffusion")  # as if it was stopped between the stages
        seen.clear()
        decided["flops"] = 0.0
        assert command("train", *words, "resume=true") == 0
        assert set(seen) == {2}
        assert document(run, "config")["threads"]["diffusion"] == 2
    finally:
        torch.set_num_threads(1)


def copied(first: Path, name: str) -> tuple[Path, str]:
    """A copy of the run in another folder, and the word that says so."""
    shutil.copytree(first.parent, first.parents[1] / name)
    return first.parents[1] / name / "tiny", f"folder={name}"


def losses(stage: Path) -> list[float]:
    """All that were logged of a stage, in order."""
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [line[figure] for line in lines for figure in ("train_loss", "val_loss") if figure in line]


def assert_same(one: Path, other: Path, *stages: str) -> None:
    """The last checkpoints hold the same bits."""
    for stage in stages:
        mine, theirs = (sorted((run / stage / "checkpoints").glob("images-*"))[-1] for run in (one, other))
        assert mine.name == theirs.name
        for file in ("weights", "ema", "optimizer"):
            tensors, wanted = (load_file(folder / f"{file}.safetensors") for folder in (mine, theirs))
            assert tensors.keys() == wanted.keys()
            assert all(torch.equal(tensors[key], wanted[key]) for key in wanted), f"{stage} {file}"


def test_one_command_trains_and_reports(first: Path) -> None:
    report = json.loads((first / "report.json").read_text())
    assert set(report["adherence"]) == {"time", "terrain", "light", "sky", "all"}
    assert all(0 <= share <= 1 for share in report["adherence"].values())
    assert report["psnr_db"] > 0
    assert report["seconds"] > 0
    assert (report["images_seen"], report["autoencoder_images_seen"]) == (64, 32)
    page = (first / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "psnr_db" in page
    with Image.open(first / "contact_sheet.png") as sheet:
        assert sheet.size == (4 * (64 + 6) + 6, 64 + 6 + 46 + 6)
    assert [p.name for p in sorted((first / "diffusion" / "pictures").iterdir())] == [
        "000000000032.png", "000000000064.png",
    ]  # fmt: skip


def test_the_same_command_again_trains_nothing(first: Path, command: Command, capsys: Any) -> None:
    def times() -> dict[Path, int]:
        kept = (path for path in first.rglob("*") if path.is_file() and path.name != "lock.json")
        return {path: path.stat().st_mtime_ns for path in kept}

    before = times()
    assert command("train", *WORDS) == 0
    printed = capsys.readouterr().out
    assert "stage autoencoder: done, 32 images seen" in printed
    assert "stage diffusion: done, 64 images seen" in printed
    assert "Next: python sample.py checkpoint=runs/tiny" in printed
    assert times() == before


def test_a_stopped_autoencoder_goes_on_bit_for_bit(first: Path, command: Command, capsys: Any) -> None:
    run, folder = copied(first, "stopped")
    shutil.rmtree(run / "diffusion")
    shutil.rmtree(max((run / "autoencoder" / "checkpoints").glob("images-*")))
    assert command("train", *WORDS, folder) == 4
    assert "go on with resume=true, or give another name" in capsys.readouterr().err
    assert command("train", *WORDS, folder, "resume=true") == 0
    assert_same(run, first, "autoencoder", "diffusion")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler asks for it
def test_a_compiled_run_learns_the_same(
    place: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run of more than 20 minutes on a CPU, and every run on a GPU, goes through."""
    for folder in ("eager", "compiled"):
        save_judge(AdherenceJudge(), place / folder / "judge")
    words = [*WORDS, "plan.diffusion.log_every_images=16"]
    assert command("train", *words, "folder=eager") == 0
    compiled = replace(FIXED, compiled=True)
    monkeypatch.setattr(preflight, "decide", lambda *_: (compiled, 0.01))
    assert command("train", *words, "folder=compiled", "trainer.compile=on") == 0
    assert document(place / "compiled" / "tiny", "state")["compute"]["compiled"]
    for stage in ("autoencoder", "diffusion"):
        ours, wanted = (losses(place / folder / "tiny" / stage) for folder in ("compiled", "eager"))
        assert len(wanted) >= 3
        assert ours == pytest.approx(wanted, rel=1e-3)


def test_a_killed_run_goes_on_bit_for_bit(first: Path, command: Command) -> None:
    place = first.parents[1]
    save_judge(AdherenceJudge(), place / "killed" / "judge")
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    words = [*WORDS, "folder=killed"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], cwd=place, env=environment, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    run = place / "killed" / "tiny"
    assert [p.name for p in (run / "diffusion" / "checkpoints").glob("images-*")] == ["images-000000000032"]
    assert command("train", *words, "resume=true") == 0
    assert_same(run, first, "autoencoder", "diffusion")
    seen = [
        json.loads(line)["images"] for line in (run / "diffusion" / "metrics.jsonl").read_text().splitlines()
    ]
    assert seen == [32, 64]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("objective.times.mean=0.25", "objective.times.mean was 0.5, now 0.25"),
        ("backbone.channels=[16,32]", "backbone.channels was [16, 16], now [16, 32]"),
        ("autoencoder.latent_channels=2", "autoencoder.latent_channels was 4, now 2"),
        ("seed=1", "seed was 0, now 1"),
        ("rendered.images=16", "the shards hold other samples"),
    ],
)
def test_changed_settings_are_refused(
    word: str, said: str, first: Path, command: Command, capsys: Any
) -> None:
    assert command("train", *WORDS, word) == 4
    error = capsys.readouterr().err
    assert said in error
    assert "give this run another name" in error
    assert "Traceback" not in error


def test_another_autoencoder_is_noticed(first: Path, command: Command, capsys: Any) -> None:
    """An autoencoder that is trained further leaves a half trained diffusion stage without its latents."""
    _, folder = copied(first, "longer")
    run = first.parents[1] / "longer" / "tiny"
    shutil.rmtree(max((run / "diffusion" / "checkpoints").glob("images-*")))
    assert command("train", *WORDS, folder, "resume=true", "plan.autoencoder.images=36") == 4
    assert "was trained on the latents of another autoencoder" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_code(
    number: int, code: int, first: Path, command: Command, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def press(*_: Any) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Clock, "on_train_batch_start", press)
    assert command("train", *WORDS, f"name=signal-{code}") == code
    assert capsys.readouterr().err.strip() == "train.py: stopped and saved; continue with resume=true"
    kept = first.parent / f"signal-{code}" / "autoencoder" / "checkpoints"
    # What a signal asks for is exchanged with a step's numbers, which are looked at a step later.
    assert [p.name for p in kept.glob("images-*")] == ["images-000000000008"]


def test_a_second_command_in_the_same_folder_is_refused(first: Path, command: Command, capsys: Any) -> None:
    with run_lock(first, [1]):
        assert command("train", *WORDS) == 5
    error = capsys.readouterr().err
    assert f"runs/tiny is in use by process {os.getpid()} on " in error
    assert "give this run another name=" in error


def test_pictures_from_the_run_and_from_its_export(first: Path, command: Command, capsys: Any) -> None:
    assert export([str(first), "model.safetensors"]) == 0
    words = ["prompt=[a dawn over the sea,noon]", "num_images=2", "seed=3", "device=cpu", "num_steps=2"]
    assert command("sample", "checkpoint=runs/tiny", "output=a", *words) == 0
    assert command("sample", "checkpoint=model.safetensors", "output=b", "batch_size=4", *words) == 0
    place = first.parents[1]
    pngs = sorted(path.name for path in (place / "a").glob("0*.png"))
    assert pngs == [f"{k:05d}.png" for k in range(4)]
    for name in pngs:
        assert Image.open(place / "a" / name).tobytes() == Image.open(place / "b" / name).tobytes()
    mine, other = (json.loads((place / folder / "00002.json").read_text()) for folder in ("a", "b"))
    assert len(mine["checkpoint_sha256"]) == 64
    assert {**mine, "checkpoint": "model.safetensors"} == other
    wanted = {
        "prompt": "noon",
        "seed": 3,
        "index": 2,
        "num_steps": 2,
        "guidance_scale": 2.5,
        "size": [32, 32],
    }
    assert {key: mine[key] for key in wanted} == wanted
    assert (mine["sampler"]["name"], mine["grid"]["name"]) == ("unipc", "warped")
    assert mine["guidance"]["interval_low"] == 0.6
    with Image.open(place / "a" / "00000.png") as picture:
        assert (picture.size, picture.mode) == ((32, 32), "RGB")


def test_sampling_needs_no_lightning(first: Path) -> None:
    words = [
        f"checkpoint={first}",
        "prompt=sea",
        "num_images=1",
        f"output={first.parents[1] / 'c'}",
        "device=cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-c", NO_LIGHTNING, *words], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_training_goes_on_from_precomputed_moments(first: Path, command: Command, capsys: Any) -> None:
    """The autoencoder of a run makes the moments that the diffusion stage of the same run then reads."""
    run, folder = copied(first, "precomputed")
    shutil.rmtree(run / "diffusion")
    assert command("train", *WORDS, folder, "data.precomputed=precomputed/moments") == 3
    assert "precompute" in capsys.readouterr().err
    assert precompute([str(run), "precomputed/moments"]) == 0
    assert command("train", *WORDS, folder, "data.precomputed=precomputed/moments") == 0
    ours, wanted = (losses(each / "diffusion") for each in (run, first))
    assert ours == pytest.approx(wanted, rel=1e-3)


def test_several_sources_are_mixed(first: Path, command: Command, capsys: Any) -> None:
    shards = next(path for path in (first.parents[1] / "shards").iterdir() if path.is_dir())
    shutil.copytree(shards / "train", first.parents[1] / "more", dirs_exist_ok=True)
    sources = f"data.sources={{{shards}: 3, more: 1}}"
    words = [word for word in WORDS if not word.startswith(("name=", "rendered."))]
    assert command("train", *words, sources, "data.val_fraction=0.2", "stages=[autoencoder]") == 0
    assert f"landscapes-{shards.name}-more" in capsys.readouterr().out


def test_pictures_are_encoded_ahead_where_that_is_asked_for(
    first: Path, command: Command, capsys: Any
) -> None:
    """In one command with both stages, and again as it began; it is the same training."""
    run, folder = copied(first, "ahead")
    shutil.rmtree(run)
    words = (*WORDS, folder, "resume=true")
    assert command("train", *words, "data.precompute=on") == 0
    told = capsys.readouterr().out
    assert "encoded once, ahead of the steps" in told
    assert (run / "moments" / "precomputed.json").exists()
    assert document(run, "state")["data"]["plan"] == {"moments": "stored"}
    ours, wanted = (losses(each / "diffusion") for each in (run, first))
    assert ours == pytest.approx(wanted, rel=1e-3)
    # What began with moments goes on with them, whatever is asked for now; what did not, without.
    longer = "plan.diffusion.images=96"
    (run / "moments").rename(run / "elsewhere")
    assert command("train", *words) == 0  # it is finished and needs none
    assert command("train", *words, longer) == 4
    assert "make them again: python scripts/precompute.py" in capsys.readouterr().err
    (run / "elsewhere").rename(run / "moments")
    assert command("train", *words, longer, "data.precompute=off") == 0
    assert "encoded once" not in capsys.readouterr().out
    other, folder = copied(first, "plainly")
    assert command("train", *WORDS, folder, "resume=true", longer, "data.precompute=on") == 0
    assert not (other / "moments").exists()


def test_a_failure_to_encode_ahead_says_how_to_go_on(
    first: Path, command: Command, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = copied(first, "unable")
    shutil.rmtree(run / "diffusion")
    monkeypatch.setattr(ahead, "has_room", lambda *_: False)
    assert command("train", *WORDS, folder, "data.precompute=on") == 5
    assert "data.precompute=off" in capfd.readouterr().err
    monkeypatch.setattr(ahead, "has_room", lambda *_: True)
    (run / "moments").write_text("in the way")
    assert command("train", *WORDS, folder, "data.precompute=on") == 5
    told = capfd.readouterr().err.splitlines()
    assert "precompute.py: " in told[-2]
    assert "resume=true, or train without: data.precompute=off" in told[-1]
    monkeypatch.setattr("data.datamodule.AHEAD_FROM", 0)
    assert command("train", *WORDS, folder) == 0  # unasked it is no error
    assert "pictures are encoded in every step" in capfd.readouterr().out
