"""The command and its arms: the same pictures and as many in each, pairs of rounds, ratios that are true."""

import gc
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data.datamodule import ShardData
from data.index import Index
from data.transforms import ResizeCrop
from data.writer import write_shard
from evaluation.adherence import AdherenceJudge, save_judge
from scripts import bench
from scripts.bench import main, parser
from scripts.benches.findings import Findings
from scripts.benches.loader import loader
from scripts.benches.loader_arms import _extents
from scripts.benches.loader_plain import Transform, batches, opened, samples
from scripts.benches.measuring import Arm, Lap, Ratio, cpu, interleave, machine, peak_rss, rate, ratio, wall
from scripts.benches.pictures import SIZE, write_pictures
from scripts.benches.sampling import gap_interval

PROJECT = Path(__file__).resolve().parents[2]
KEYS = {
    *("bench", "decode_ratio", "webdataset_ratio", "moments_ratio", "aa", "intervals", "wanted", "workers"),
    *("images", "rounds", "side", "source", "images_per_second", "images_per_round", "cpu_ms", "cpu_ratios"),
    *("peak_rss_mb", "device", "torch", "load"),
}


def laps(*seconds: float, units: int = 10) -> list[Lap]:
    return [Lap(units, each, None) for each in seconds]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of 32 small pictures."""
    folder = tmp_path / "small"
    folder.mkdir()
    for number in range(2):
        samples = []
        for row in range(32 * number, 32 * number + 32):
            values = np.random.default_rng(row).integers(0, 256, (12, 16, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(values).resize((64, 48), Image.Resampling.BICUBIC).save(buffer, "PNG")
            samples.append((f"{row:05d}", {"png": buffer.getvalue(), "txt": b"picture %d" % row}))
        write_shard(folder / f"{number:05d}.tar", samples)
    return folder


# --- measuring ----------------------------------------------------------------------------------------------


def test_arms_take_turns_forwards_and_backwards() -> None:
    ran: list[str] = []
    arms = [Arm(name, lambda name=name: ran.append(name) or 1) for name in "abc"]  # type: ignore[misc]
    found = interleave(arms, 4, warm_up=1)
    assert "".join(ran) == "cba" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(each) for name, each in found.items()} == {"a": 4, "b": 4, "c": 4}


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_rounds_are_pairs(rounds: int) -> None:
    with pytest.raises(ValueError, match="an even number"):
        interleave([Arm("a", lambda: 1)], rounds)


def test_arms_that_do_unequal_work_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"b did \[3, 3\] units, a 4"):
        interleave([Arm("a", lambda: 4), Arm("b", lambda: 3)], 2, warm_up=0)


def test_the_time_of_a_lap_is_its_own() -> None:
    arms = [Arm("slow", lambda: time.sleep(0.03) or 1), Arm("quick", lambda: time.sleep(0.005) or 1)]  # type: ignore[func-returns-value]
    found = interleave(arms, 2, warm_up=0)
    assert all(0.03 <= lap.wall < 0.3 for lap in found["slow"])
    assert min(lap.wall for lap in found["quick"]) < 0.03
    assert found["slow"][0].cpu is not None
    assert found["slow"][0].cpu < 0.02


def test_the_processor_time_of_other_processes_counts() -> None:
    code = "import sys\nfor _ in sys.stdin:\n    sum(range(8_000_000)); print(flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def run() -> int:
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()
            return 1

        found = interleave([Arm("child", run, lambda: [child.pid])], 2)
        megabytes = peak_rss([child.pid])
        child.stdin.close()
    if (used := found["child"][0].cpu) is None:
        pytest.skip("this system does not tell other processes' time")
    assert 0.03 < used < 10
    assert megabytes is not None
    assert 1 < megabytes < 1000
    assert peak_rss([child.pid]) is None


def test_a_drift_cancels_within_a_pair() -> None:
    # The machine slows down steadily; `b` takes twice as long as `a` at any moment.
    a, b = laps(1, 8, 9, 16), laps(2 * 3, 2 * 6, 2 * 11, 2 * 14)
    found = ratio(a, b, wall)
    assert found is not None
    assert found.value == pytest.approx(2.0)
    assert found.interval is None
    assert ratio(a, b, cpu) is None


def test_the_interval_holds_the_truth_and_widens_with_noise() -> None:
    rng = np.random.default_rng(0)
    width = []
    for noise in (0.01, 0.1):
        a, b = (laps(*(seconds * rng.lognormal(0, noise, 60))) for seconds in (1.0, 1.5))
        found = ratio(a, b, wall)
        assert found is not None
        assert found.interval is not None
        low, high = found.interval
        assert low < 1.5 < high
        assert low <= found.value <= high
        width.append(high - low)
    assert width[1] > 3 * width[0]


def test_a_rate_is_units_a_second() -> None:
    assert rate(laps(1, 1, 2, 3, 1, 1, units=8)) == 8.0


def test_the_machine_is_named() -> None:
    found = machine()
    assert f"{torch.get_num_threads()} threads" in found["device"]
    assert found["torch"] == torch.__version__


# --- findings -----------------------------------------------------------------------------------------------


def findings(aa: float, interval: tuple[float, float] | None) -> Findings:
    ratios = {"speed": Ratio(1.06, interval), "aa": Ratio(aa, None)}
    return Findings("x", {"more": 1}, [("", "s"), ("a", "1")], ratios, {"speed": 1.05}, {"speed": "aa"})


@pytest.mark.parametrize(
    ("aa", "interval", "said"),
    [
        (1.01, (1.051, 1.07), "wanted 1.05: met"),
        (0.99, (1.04, 1.07), "wanted 1.05: met, but not surely"),
        (1.0, None, "wanted 1.05: met, but not surely"),
        (1.0, (0.98, 1.07), "wanted 1.05: met, but not surely  (not told apart from 1)"),
        (0.97, (1.051, 1.07), "wanted 1.05: met  (not told apart from 1)"),
    ],
)
def test_a_verdict_says_how_sure_it_is(aa: float, interval: tuple[float, float] | None, said: str) -> None:
    found = findings(aa, interval)
    assert next(line for line in found.text().splitlines() if line.startswith("speed")).endswith(said)
    document = json.loads(found.line())
    assert document["not_told_from_1"] == (["speed"] if "not told" in said else [])
    assert document["intervals"]["speed"] == (list(interval) if interval else None)
    assert (document["speed"], document["more"]) == (1.06, 1)


# --- arms ---------------------------------------------------------------------------------------------------


# webdataset leaves the closing of its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_plain_gives_what_webdataset_itself_gives(shards: Path) -> None:
    paths = sorted(shards.glob("*.tar"))
    theirs = (
        webdataset.WebDataset([str(path) for path in paths], shardshuffle=2)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("png", "txt")
        .map_tuple(Transform(16))
    )
    expected = {caption: pixels for pixels, caption in theirs}
    del theirs
    gc.collect()
    found = {caption: pixels for pixels, caption in samples(paths, 16)}
    assert len(found) == 64
    assert found.keys() == expected.keys()
    assert all(torch.equal(pixels, expected[caption]) for caption, pixels in found.items())


def test_plain_batches_are_whole_and_passes_follow_each_other(shards: Path) -> None:
    seen: list[str] = []
    for pixels, captions in islice(batches([shards / "00000.tar"], 16), 3):
        assert pixels.shape == (64, 3, 16, 16)
        assert pixels.dtype == torch.uint8
        seen += captions
    assert sorted(seen) == sorted(6 * [f"picture {row}" for row in range(32)])


def test_plain_opens_files_and_runs_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(opened([{"url": f"pipe:touch {tmp_path / 'ran'}"}]))
    assert not (tmp_path / "ran").exists()


def test_the_plain_transform_is_ours_but_at_the_edges() -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((128, 96), Image.Resampling.BICUBIC)
    # Theirs is resized before the crop, so that pictures beyond it show at its sides; ours is reduced first.
    plain, ours = (each(image).int()[:, :, 3:-3] for each in (Transform(24), ResizeCrop(24)))
    difference = (plain - ours).abs().float()
    assert float(difference.max()) <= 6
    assert float(difference.mean()) <= 1


def test_the_ceiling_decodes_the_pictures_that_ours_loads(shards: Path, tmp_path: Path) -> None:
    train, _ = ShardData(str(shards), 16, val_fraction=0.0, cache=str(tmp_path / "cache")).open(0)
    for i, (path, offset, size, name) in enumerate(_extents(train, 64)):
        image = Image.open(io.BytesIO(Path(path).read_bytes()[offset : offset + size]))
        assert name == "png"
        assert torch.equal(ResizeCrop(16)(image.convert("RGB")), train[i].pixels)


def test_made_pictures_are_like_photographs(tmp_path: Path) -> None:
    index = Index.open(str(write_pictures(tmp_path / "p", 5, 2, distinct=3)))
    assert [index.shard(number).count for number in range(2)] == [2, 3]
    shard = index.shard(0)
    assert shard.image_size(0) == SIZE == (1024, 768)
    extent = shard.extent(0, "jpg")
    assert extent is not None
    assert 1.0 < 8 * extent.size / (SIZE[0] * SIZE[1]) < 4.0  # bits a pixel
    assert shard.extent(0, "txt") is not None


# --- the command --------------------------------------------------------------------------------------------


def test_options_are_the_arguments_of_the_function(capsys: pytest.CaptureFixture[str]) -> None:
    args = parser().parse_args(["loader", "--side", "64", "--shards", "some/where"])
    assert (args.images, args.side, args.workers, args.rounds) == (2000, 64, 2, 12)
    assert args.shards == Path("some/where")
    with pytest.raises(SystemExit):
        parser().parse_args(["loader", "--help"])
    assert "pixels a side that pictures are made. (256)" in capsys.readouterr().out


def test_a_benchmark_is_one_function_in_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def nothing(times: int = 1) -> Findings:
        """Returns nothing much.

        Args:
            times: how often.
        """
        return findings(1.0 / times, None)

    monkeypatch.setitem(bench.BENCHMARKS, "nothing", nothing)
    assert main(["nothing", "--times", "2", "--out", str(tmp_path / "out")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert json.loads(last)["aa"] == 0.5
    assert json.loads((tmp_path / "out" / "nothing.json").read_text()) == json.loads(last)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["loader", "--workers", "0"], 2, "must be at least 1"),
        (["loader", "--rounds", "3"], 2, "an even number"),
        (["loader", "--rounds", "x"], 2, "invalid int value"),
        (["loader", "--shards", "nowhere"], 3, "nowhere: no such file or folder"),
        (["tea"], 2, "invalid choice"),
    ],
)
def test_a_wrong_option_is_said_at_once(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    try:
        found: object = main(words)
    except SystemExit as stop:
        found = stop.code
    assert found == code
    assert said in capsys.readouterr().err
    assert time.monotonic() - began < 3


@pytest.mark.slow
def test_the_command(shards: Path, tmp_path: Path) -> None:
    words = ["loader", "--images", "60", "--side", "16", "--workers", "2", "--rounds", "2"]
    command = [sys.executable, str(PROJECT / "scripts" / "bench.py"), *words, "--shards", str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document.keys() >= KEYS
    assert document["images"] == 128
    assert set(document["images_per_round"].values()) == {128}
    assert document["images_per_round"].keys() == {"ours", "ceiling", "plain", "ours again"}
    assert document["source"]["size"] == [64, 48]
    assert all(document[name] > 0 for name in ("decode_ratio", "webdataset_ratio", "moments_ratio", "aa"))
    assert list(tmp_path.iterdir()) == [shards]


def test_the_function_is_the_command() -> None:
    assert bench.BENCHMARKS["loader"] is loader


def test_sampling_is_measured_and_judged(
    make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    run = make_run(tmp_path / "run", {**tiny_config, "resolution": 32})
    save_judge(AdherenceJudge(), tmp_path / "judge")
    words = ["--images", "2", "--rounds", "2", "--pictures", "4", "--seeds", "2", "--batch", "2"]
    words += ["--starts", "0"]
    assert main(["sampling", "--checkpoint", str(run), *words, "--usual-scale", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["speedup"] > 3  # 3 steps instead of 50
    assert 0.2 < found["aa"] < 5
    assert -100 <= found["adherence_gap"] <= 100
    assert found["distance_floor"] > 0
    assert len(found["by_seed"]["usual"]) == 2
    assert set(found["by_seed"]["usual"][0]) == {"time", "terrain", "light", "sky", "all", "distance"}
    assert (found["num_steps"], found["usual_steps"], found["usual_scale"]) == (3, 50, 2.0)
    low, high = found["adherence_gap_interval"]
    assert low <= found["adherence_gap"] <= high
    assert found["one_picture_ms"]["ours"]["wall"] < found["one_picture_ms"]["usual"]["wall"]
    assert (found["cold_start"], found["student_sha256"], found["wanted"]) == (None, None, {"speedup": 5.0})
    assert main(["sampling", "--checkpoint", str(tmp_path / "absent")]) == 4
    assert "there is no such run folder" in capsys.readouterr().err


def test_a_student_takes_the_place_of_ours(
    make_run: Callable[..., Path],
    tiny_config: dict[str, Any],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("scripts.benches.sampling.USUAL_STEPS", 8)
    run = make_run(tmp_path / "run", {**tiny_config, "resolution": 32})
    few = {"sampler": {"name": "euler"}, "sampling": {"num_steps": 1, "guidance_scale": 1.0}}
    student = {**tiny_config, **few, "resolution": 32, "student": {"guidance_scale": 2.0, "decoder": None}}
    other = make_run(tmp_path / "student", student, seed=1)
    save_judge(AdherenceJudge(), tmp_path / "judge")
    words = ["--images", "2", "--rounds", "2", "--pictures", "4", "--seeds", "1", "--batch", "2"]
    words += ["--starts", "0", "--checkpoint", str(run), "--student", str(other)]
    assert main(["sampling", *words, "--usual-scale", "2"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["num_steps"], found["guidance_scale"], found["wanted"]) == (1, 1.0, {"speedup": 15.0})
    assert found["student_sha256"] != found["checkpoint_sha256"]
    with pytest.raises(SystemExit, match="2"):
        main(["sampling", *words, "--steps", "3"])
    assert "a student of 1 steps" in capsys.readouterr().err


def test_the_gap_is_resampled_by_prompts() -> None:
    usual = [torch.tensor([True] * 90 + [False] * 10)] * 2
    ours = [torch.tensor([True] * 80 + [False] * 20)] * 2
    low, high = gap_interval(usual, ours)
    assert 3 < low < 10 < high < 17
    assert gap_interval(usual, usual) == (0.0, 0.0)
