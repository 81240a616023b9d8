"""The step benchmark: networks that agree are timed, others are refused, and the JSON says what it should."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.cli import composed
from models.stages.compute import Compute
from models.unet import UNet
from scripts import bench
from scripts.benches import step as step_module
from scripts.benches.findings import Findings
from scripts.benches.measuring import Ratio
from scripts.benches.step import OURS, THEIRS, best_way, ceilings, make_problem, narrow, would_measure
from scripts.benches.step_arms import Batch, NotEqualError, Problem, Steps, Theirs, loss, parity
from scripts.benches.step_peak import peak

pytest.importorskip("diffusers", reason="diffusers is what ours is compared with")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CPU = Compute(torch.device("cpu"), False, False, False, "")
TINY = Problem(
    {
        "name": "unet", "channels": [32, 64], "blocks_per_level": 1, "transformer_depth": [0, 1],
        "head_dim": 32, "scale_shift": True, "pooled_conditioning": True, "norm_groups": 8,
    },
    width=16, length=5, side=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> UNet:
    return TINY.unet()


@pytest.fixture
def theirs(ours: UNet) -> Theirs:
    return Theirs(ours).take(ours)


def test_equal_weights_agree_and_make_equal_steps(theirs: Theirs) -> None:
    ours, batches = TINY.unet(), [TINY.batch(2, k) for k in range(2)]
    before = loss(ours(*batches[0].inputs), batches[0]).item()
    assert max(parity(ours, theirs, batches[0]).values()) < 1e-4
    arms = [Steps(network, CPU, batches) for network in (ours, theirs)]
    for _ in range(3):
        assert [arm.step() for arm in arms] == [2, 2]
    torch.testing.assert_close(theirs(*batches[0].inputs), ours(*batches[0].inputs), rtol=1e-4, atol=1e-4)
    assert loss(ours(*batches[0].inputs), batches[0]).item() < before - 1e-3


def test_a_wrong_weight_is_caught(ours: UNet, theirs: Theirs) -> None:
    with torch.no_grad():
        theirs.network.get_parameter("conv_in.weight")[0, 0, 1, 1] += 1e-3
    with pytest.raises(NotEqualError, match="nothing is timed"):
        parity(ours, theirs, TINY.batch(1, 0))


def test_a_wrong_gradient_is_caught(ours: UNet, theirs: Theirs) -> None:
    """Equal outputs do not do: here a gradient is a thousandth too large."""
    name = "mid_block.resnets.0.conv1.weight"
    theirs.network.get_parameter(name).register_hook(lambda gradient: 1.001 * gradient)
    with pytest.raises(NotEqualError, match=rf"gradient of {name}"):
        parity(ours, theirs, TINY.batch(1, 0))


def test_nan_is_no_agreement(ours: UNet, theirs: Theirs) -> None:
    with torch.no_grad():
        theirs.network.get_parameter("conv_out.bias")[0] = math.nan
    with pytest.raises(NotEqualError):
        parity(ours, theirs, TINY.batch(1, 0))


def test_both_count_the_same_flops(ours: UNet) -> None:
    with torch.device("meta"):
        counts = [TINY.flops(TINY.unet()), TINY.flops(Theirs(TINY.unet()))]
    assert counts[0] == counts[1]
    # At least the first convolution: two FLOPs a weight and position, three times with the backward pass.
    assert counts[0] > 3 * 2 * (4 * 32 * 9) * 8 * 8


def test_the_fastest_way_is_theirs(monkeypatch: Any, theirs: Theirs) -> None:
    tried: list[Compute] = []

    def seconds(network: Any, way: Compute, batches: list[Batch]) -> float:
        tried.append(way)
        if not way.bf16:
            return 9.0
        return 4.0 - 2 * way.channels_last - way.compiled

    monkeypatch.setattr(step_module, "seconds", seconds)
    best, times = best_way(theirs, CPU.device, [], compiled=True)
    assert (best.bf16, best.channels_last, best.compiled) == (True, True, True)
    assert min(value for value in times.values() if value) == 1.0
    # Float32 takes over twice as long as the fastest, and bf16 channels-first just twice: not compiled.
    assert [way for way in tried if way.compiled] == [replace(best, reason="")]


def test_one_precision_has_one_ceiling(monkeypatch: Any) -> None:
    """The most that any try reached, whichever arm it was of: a stalled try would flatter one arm."""
    tries = iter([1.0, 5.0, 3.0, 2.0, 1.0, 4.0])
    monkeypatch.setattr(step_module, "matmul_ceiling", lambda way: next(tries))
    assert ceilings({OURS: CPU, THEIRS: replace(CPU, channels_last=True)}) == {OURS: 5.0, THEIRS: 5.0}
    tries = iter([1.0, 5.0, 3.0, 2.0, 1.0, 4.0])
    assert ceilings({OURS: CPU, THEIRS: replace(CPU, bf16=True)}) == {OURS: 3.0, THEIRS: 5.0}


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process() -> None:
    """A parent's peak is no part of it, and a larger batch takes more."""
    ballast = torch.ones(400_000_000, dtype=torch.uint8)
    small, before = peak(TINY, CPU, True, 1)
    large, _ = peak(TINY, CPU, True, 256)
    assert len(ballast) == 400_000_000
    assert 0 < before < small < large
    assert large - small > 30


def test_what_a_gpu_would_measure() -> None:
    problem = make_problem(composed("train", "backbone=sd2"), "sd2", 64)
    assert (problem.width, problem.length) == (1024, 77)
    line = would_measure("sd2", problem, 0)
    assert "sd2 (866 M) at 512 px" in line
    assert "31.4% MFU = 129 images/s per H200" in line
    # MLPerf's 129 images/s and 31.4 % are of one count of FLOPs, and ours is that count.
    with torch.device("meta"):
        flops = problem.flops(problem.unet())
    assert 129 * flops / 989e12 == pytest.approx(0.314, rel=0.02)
    assert narrow(problem).backbone["transformer_depth"] == problem.backbone["transformer_depth"]


def test_at_most_is_the_other_way_round() -> None:
    rows = [("", "x"), ("a", "1")]
    found = Findings(
        "step", {}, rows, {"ratio": Ratio(0.7, (0.65, 0.75))}, {}, {}, {"ratio": 0.6}, ["a note"]
    )
    assert "wanted at most 0.6: missed" in found.text()
    assert found.text().endswith("a note")
    better = replace(found, ratios={"ratio": Ratio(0.5, (0.45, 0.55))})
    assert "wanted at most 0.6: met" in better.text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--calls", "3"], "even number"),
        (["--size", "60"], "a multiple of 8"),
        (["--backbone", "tiny"], "position_size"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(["step", *options])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert words in message


def test_the_command_refuses_to_time_what_differs(
    monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(self: Theirs, unet: UNet) -> Theirs:
        take(self, unet)
        with torch.no_grad():
            self.network.get_parameter("conv_out.weight").mul_(1.01)
        return self

    take = Theirs.take
    monkeypatch.setattr(Theirs, "take", wrong)
    assert bench.main(["step", "--calls", "2", "--size", "64"]) == 6
    captured = capsys.readouterr()
    assert "nothing is timed" in captured.err
    assert not captured.out


@pytest.mark.slow
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a GPU sd2 says what it would measure and rehearses; the last line is one JSON object."""
    if torch.cuda.is_available():
        pytest.skip("here it would measure sd2 itself, for minutes")
    assert bench.main(["step", "--backbone", "sd2", "--calls", "10", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(printed[-1])
    assert json.loads((tmp_path / "step.json").read_text()) == document
    assert document["rehearsal"] is True
    assert [note.split(", ")[0] for note in document["notes"]] == [
        "on a GPU: sd2 (866 M) at 256 px",
        "on a GPU: sd2 (866 M) at 512 px",
    ]
    assert all(note in printed for note in document["notes"])
    assert 0.2 < document["ratio"] < 5
    assert document["intervals"]["ratio"][0] <= document["ratio"] <= document["intervals"]["ratio"][1]
    assert 0.2 < document["memory_ratio"] < 5
    assert set(document["mfu"]) == {OURS, THEIRS}
    assert all(0 < value < 1.5 for value in document["mfu_by_cpu_time"].values())
    assert len(document["tried_ms"]) == 4
