"""The torturer itself: a short run of everything is well, and each kind sees the fault it is there for."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import newest, save_checkpoint
from scripts.faults import saves
from scripts.faults.flips import Target, cut_file, flip_bit, look, targets
from scripts.faults.runs import (
    Broken,
    Reference,
    Steps,
    figure_faults,
    final_faults,
    lost_and_twice,
    read_figures,
    saved_states,
    state_faults,
    trace_faults,
)
from scripts.faults.schedules import BATCH, _Steps, order_of
from scripts.torture import KINDS, WANTED, Torture, main

STEPS: Steps = {
    ("diffusion", n): {"images": n, "keys": [f"k{n}", f"l{n}"], "loss": float(n).hex()}
    for n in range(0, 40, 8)
}
TRACE: list[tuple[str, dict[str, Any]]] = [(stage, dict(row)) for (stage, _), row in STEPS.items()]


@pytest.mark.slow
def test_a_short_run_of_everything_is_well(tmp_path: Path, capsys: Any) -> None:
    code = main(["--short", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    figures = json.loads(said.splitlines()[-1])
    assert code == 0, said
    assert set(WANTED) <= figures.keys()
    assert figures["identical"] == figures["kills"] > 0
    assert figures["kills_of_worker"] > 0 < figures["kills_of_rank"]
    assert (figures["silent"], figures["hangs"], figures["without_checkpoint"]) == (0, 0, 0)
    assert figures["detected"] > figures["harmless"] > 0
    assert figures["saved"] == figures["sigterms"] > 0


class _NoJobs:
    """Stands for the zygote where no trial is started."""

    count = 1

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "_NoJobs":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _told(torture: Torture, silent: int, failure: str) -> dict[str, int]:
    if failure:
        torture.report.fail("flips", failure)
    return {"silent": silent, "untidy": 0}


@pytest.mark.parametrize(
    ("silent", "failure", "code"),
    [(0, "", 0), (1, "", 1), (0, "bit 3 of byte 7 was read otherwise", 1)],
)
def test_one_planted_fault_fails_the_command(
    silent: int, failure: str, code: int, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.torture.Jobs", _NoJobs)
    monkeypatch.setitem(KINDS, "flips", lambda torture, count: _told(torture, silent, failure))
    assert main(["--only", "flips", "--seed", "4", "--out", str(tmp_path / "out")]) == code
    said = capsys.readouterr().out
    assert json.loads(said.splitlines()[-1])["silent"] == silent
    assert ("not as wanted: silent" in said) is bool(silent)
    if failure:
        assert f"FAILED flips: {failure}; repeat: python scripts/torture.py --only flips --seed 4" in said


@pytest.mark.parametrize("name", WANTED)
def test_every_figure_can_be_unwanted(name: str) -> None:
    well = dict.fromkeys(WANTED, 0) | {"kills": 4, "identical": 4, "key_orders": 1, "sigterms": 2, "saved": 2}
    assert WANTED[name](well)
    assert not WANTED[name](well | {name: {"resume_seconds": 5.1}.get(name, 3)})


@pytest.mark.parametrize("words", [["--only", "fleas"], ["--kills", "0"], ["--seed", "x"]])
def test_wrong_words_are_refused(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2


# --- kills: what a broken run is compared by ----------------------------------------------------------------


def test_replays_of_the_same_steps_are_well() -> None:
    assert trace_faults(TRACE[:3] + TRACE[1:], STEPS, finished=True) == []
    assert trace_faults(TRACE[:3], STEPS, finished=False) == []


def test_what_is_wrong_with_a_trace_is_found() -> None:
    (missing,) = trace_faults(TRACE[:2] + TRACE[3:], STEPS, finished=True)
    assert missing == "diffusion: 2 samples lost, 0 read twice"
    (unfinished,) = trace_faults(TRACE[:3], STEPS, finished=True)
    assert unfinished == "diffusion: 4 samples lost, 0 read twice"
    other = [*TRACE[:2], (TRACE[2][0], TRACE[2][1] | {"loss": (7.5).hex()}), *TRACE[3:]]
    assert trace_faults(other, STEPS, finished=True) == ["diffusion: loss differ in the step after 16 images"]
    twice = [*TRACE[:2], (TRACE[2][0], TRACE[2][1] | {"keys": ["k0", "l0"]}), *TRACE[3:]]
    assert trace_faults(twice, STEPS, finished=True)[-1] == "diffusion: 2 samples lost, 2 read twice"


def test_a_line_that_a_killed_rank_could_not_write_is_no_loss() -> None:
    gap = TRACE[:2] + TRACE[3:]
    assert trace_faults(gap, STEPS, True, proven={("diffusion", 16)}) == []


def test_samples_are_counted() -> None:
    assert lost_and_twice(["a", "b", "b"], ["a", "b", "c", "d"]) == (2, 1)


def test_other_states_and_figures_are_found(tmp_path: Path) -> None:
    files = {f"{name}.safetensors": name for name in ("weights", "ema", "optimizer")}
    line = {"stage": "diffusion", "name": "images-000000000008", "files": files}
    (tmp_path / "saved").write_text(json.dumps(line) + "\n" + '{"stage": "diff')
    reference = Reference(states=dict(saved_states(tmp_path / "saved")))
    assert state_faults(tmp_path / "saved", reference) == []
    reference.states["diffusion", 8] = ("weights", "other", "optimizer")
    assert state_faults(tmp_path / "saved", reference) == ["diffusion: ema.safetensors differ at 8 images"]
    assert state_faults(tmp_path / "saved", Reference()) == [
        "diffusion: saved at 8 images, where no step ends"
    ]

    (tmp_path / "diffusion").mkdir()
    metrics = tmp_path / "diffusion" / "metrics.jsonl"
    metrics.write_text('{"images": 8, "train_loss": 1.0, "images_per_second": 3}\n')
    reference = Reference(figures=read_figures(tmp_path))
    metrics.write_text('{"images": 8, "train_loss": 1.0, "images_per_second": 4}\n')
    assert figure_faults(tmp_path, reference, finished=True) == []
    metrics.write_text('{"images": 8, "train_loss": 1.5}\n')
    assert "train_loss differ at 8 images" in figure_faults(tmp_path, reference, finished=True)[0]
    metrics.write_text("")
    assert figure_faults(tmp_path, reference, finished=False) == []
    assert "no line at ('diffusion', 8)" in figure_faults(tmp_path, reference, finished=True)[0]


def test_another_last_state_is_found(tmp_path: Path) -> None:
    broken, reference = Broken(tmp_path, 16), Reference()
    for stage, images in (("autoencoder", 96), ("diffusion", 16)):
        folder = save_checkpoint(broken.checkpoints(stage), images, *saves.content(images))
        files = json.loads((folder / "manifest.json").read_text())["files"]
        hashes = tuple(files[f"{name}.safetensors"]["sha256"] for name in ("weights", "ema", "optimizer"))
        reference.states[stage, images] = hashes
    assert final_faults(broken, reference) == []
    wanted = reference.states["diffusion", 16]
    reference.states["diffusion", 16] = (*wanted[:2], "0" * 64)
    assert final_faults(broken, reference) == ["diffusion: its last state differs"]
    flip_bit(folder / "ema.safetensors", 300, 2)
    assert final_faults(broken, reference) == ["diffusion: its last checkpoint is None"]


def test_the_order_of_a_schedule_is_that_of_the_last_attempts(tmp_path: Path) -> None:
    folder = tmp_path / "diffusion"
    folder.mkdir()

    def attempt(first: int, last: int, ranks: int, key: str = "") -> None:
        for rank in range(ranks):
            with (folder / f"trace-{rank}.jsonl").open("a") as file:
                for images in range(first, last, BATCH):
                    share = BATCH // ranks
                    keys = [f"{key}{images + rank * share + k}" for k in range(share)]
                    file.write(json.dumps({"images": images, "keys": keys}) + "\n")

    whole = 20 * BATCH
    steps = _Steps()
    attempt(0, 80, 1)
    steps.add(tmp_path, 1)
    attempt(40, 120, 2)
    steps.add(tmp_path, 2)
    attempt(120, whole, 1)
    steps.add(tmp_path, 1)
    assert order_of(steps, whole) == tuple(str(k) for k in range(whole))
    attempt(whole - BATCH, whole, 1, "x")
    assert order_of(steps.add(tmp_path, 1), whole)[-1] == f"x{whole - 1}"


# --- flips: what reading says about damage ------------------------------------------------------------------


class _Careless(Target):
    """A file of four bytes, of which reading looks at the first two only, and never checks."""

    share = 1.0

    def make(self) -> None:
        self.whole.mkdir(parents=True)
        (self.whole / "file").write_bytes(b"abcd")

    def read(self) -> Any:
        data = (self.work / "file").read_bytes()
        if not data:
            raise KeyError("file")
        return {"data": data[:2].hex()}, data[2:3] != b"c"


@pytest.mark.parametrize(
    ("place", "outcome"), [(0, "silent"), (1, "silent"), (2, "detected"), (3, "harmless"), (None, "untidy")]
)
def test_damage_is_judged(place: int | None, outcome: str, tmp_path: Path) -> None:
    target = _Careless(tmp_path)
    target.make()
    target.renew()
    wanted = target.read()
    if place is None:
        cut_file(target.work / "file", 0)
    else:
        flip_bit(target.work / "file", place, 3, keep_time=True)
    assert look(target, wanted, dict(wanted[0]))[0] == outcome


@pytest.mark.parametrize("name", ["shards", "indexes", "catalogue", "moments", "checkpoints"])
def test_damage_to_every_kind_of_file_is_noticed(name: str, tmp_path: Path) -> None:
    target = targets(tmp_path)[name]
    target.make()
    target.renew()
    wanted = target.read()
    assert not wanted[1]
    file = next(path for path in target.files() if path.endswith((".tar", ".idx", "ema.safetensors")))
    size = (target.work / file).stat().st_size
    cut_file(target.work / file, size - 700 if size > 2_000 else size // 2)
    known = dict(wanted[0])
    outcomes = {
        "catalogue": {"harmless"},
        "checkpoints": {"silent"},
    }  # made anew; `known` lacks the one before
    assert look(target, wanted, known)[0] in outcomes.get(name, {"detected"})


# --- saves --------------------------------------------------------------------------------------------------


def test_a_save_without_a_checkpoint_is_found(tmp_path: Path) -> None:
    for images in (1, 2):
        save_checkpoint(tmp_path, images, *saves.content(images))
    assert saves.what_is_wrong(tmp_path, 2, saved=True) == ""
    assert "the newest is images-000000000002" in saves.what_is_wrong(tmp_path, 3, saved=True)
    assert saves.what_is_wrong(tmp_path, 3, saved=False) == ""
    cut_file(tmp_path / "images-000000000001" / "ema.safetensors", 100)
    assert saves.what_is_wrong(tmp_path, 2, saved=True) == "only 1 checkpoint verifies"
    flip_bit(tmp_path / "images-000000000002" / "state.json", 5, 1)
    assert saves.what_is_wrong(tmp_path, 2, saved=False) == "no checkpoint verifies"


def test_other_numbers_than_were_saved_are_found(tmp_path: Path) -> None:
    tensors, documents = saves.content(3)
    tensors["ema"]["b"] = torch.zeros(3, 5)
    save_checkpoint(tmp_path, 3, tensors, documents)
    checkpoint = newest(tmp_path)
    assert saves.wrong_numbers(checkpoint).endswith("ema.safetensors holds other numbers than were saved")


def test_a_crash_comes_at_every_call_that_touches_files(tmp_path: Path) -> None:
    def crashes(call: int, after: bool) -> tuple[int, bool]:
        place = tmp_path / f"{call}-{after}"
        pid = os.fork()
        if not pid:
            saves.crash_at(call, after)
            os.mkdir(place)
            os.rmdir(place)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), place.exists()

    assert crashes(0, after=False) == (saves.CRASHED, False)
    assert crashes(0, after=True) == (saves.CRASHED, True)
    assert crashes(1, after=False) == (saves.CRASHED, True)
    assert crashes(1, after=True) == (saves.CRASHED, False)
    assert crashes(2, after=False) == (0, False)
