"""The quality benchmark: the recipe is what it says, horizons are found as told, times are whole."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data.batch import Batch
from data.landscapes import write_landscapes
from models.loading import build_networks
from models.registry import build
from models.stages.compute import Compute
from models.stages.plan import Plan
from scripts import bench
from scripts.benches.quality import quality, spread
from scripts.benches.quality_arms import ARMS, OURS, PATCHED, RECIPE, UNPATCHED, scaled
from scripts.benches.quality_exam import Score
from scripts.benches.quality_measurement import HORIZONS, Choice, Measurement, Settings, Tried, best_of
from scripts.benches.quality_train import ClockKind, Point, Spent, Stopwatch, Training
from scripts.benches.recipe import Recipe

pytest.importorskip("diffusers", reason="diffusers is what ours is compared with")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

CPU = Compute(torch.device("cpu"), False, False, False, "")
CHOICE = Choice(1.0, 3.0, {})
TARGET = Score(0.5, 20.0)


def make_recipe(tiny_config: dict[str, Any], patch_size: int = 1) -> tuple[Recipe, dict[str, Any]]:
    backbone = {**tiny_config["backbone"], "patch_size": patch_size}
    config = {**tiny_config, "backbone": backbone}
    config["text_encoder"] = {**tiny_config["text_encoder"], "mask_padding": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        autoencoder, text_encoder, _ = build_networks(config)
    return Recipe(backbone, autoencoder, text_encoder, 3e-3, 0, CPU), config


def make_batch(recipe: Recipe, size: int, rng: torch.Generator) -> Batch:
    captions = [f"a sea, number {k}" for k in range(size)]
    pixels = torch.randint(0, 256, (size, 3, 16, 16), generator=rng, dtype=torch.uint8)
    tokens = recipe.text_encoder.tokenize(captions)
    return Batch(pixels, tokens, torch.arange(size), captions, captions)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_our_network_computes_what_the_recipe_learnt(
    tiny_config: dict[str, Any], rng: torch.Generator, patch_size: int
) -> None:
    recipe, config = make_recipe(tiny_config, patch_size)
    batch = make_batch(recipe, 4, rng)
    losses = [recipe.step(batch) for _ in range(3)]
    assert recipe.images_seen == 12
    assert all(math.isfinite(loss) for loss in losses)
    _, text_encoder, backbone = build_networks(config)
    averaged = recipe.averaged()
    for name, network in (("text_encoder", text_encoder), ("backbone", backbone)):
        mine = {k.removeprefix(f"{name}."): v for k, v in averaged.items() if k.startswith(f"{name}.")}
        network.load_state_dict(mine)
    x = torch.randn(4, 4, 4, 4, generator=rng)
    timesteps = torch.tensor([0, 10, 500, 999])
    theirs = recipe.ema.network["backbone"](x, timesteps, recipe.ema.network["text_encoder"](batch.tokens))
    ours = backbone(x, timesteps.float(), text_encoder(batch.tokens))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_recipe_learns_the_noise(tiny_config: dict[str, Any], rng: torch.Generator) -> None:
    recipe, _ = make_recipe(tiny_config)
    batch = make_batch(recipe, 16, rng)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def oracle(x_t: torch.Tensor, timesteps: torch.Tensor, _: object) -> torch.Tensor:
        """The noise, of latents that are known to be the same for each sample."""
        alpha, sigma = recipe.schedule(recipe.schedule.discrete_time(timesteps))
        seen.append((alpha, sigma))
        return (x_t - alpha[:, None, None, None] * latents) / sigma[:, None, None, None]

    moments = recipe.autoencoder.encode(batch.images)
    moments[:, 4:] = -30.0  # nothing to draw: the posterior is a point
    recipe.autoencoder.encode = lambda images: moments  # type: ignore[method-assign]
    latents = recipe.autoencoder.mode(moments)
    recipe.call = oracle
    assert recipe.loss(batch).item() < 1e-6
    alpha, sigma = seen[0]
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(16))


def test_captions_are_dropped_a_tenth_of_the_time(tiny_config: dict[str, Any], rng: torch.Generator) -> None:
    recipe, _ = make_recipe(tiny_config)
    batch = make_batch(recipe, 100, rng)
    told: list[torch.Tensor] = []
    encode = recipe.text_encoder.forward
    recipe.text_encoder.forward = lambda tokens: (told.append(tokens), encode(tokens))[1]  # type: ignore
    for _ in range(4):
        recipe.loss(batch)
    empty = torch.cat([(tokens == recipe.empty).all(1) for tokens in told])
    assert 20 <= int(empty.sum()) <= 65, "of 400"


def test_a_text_encoder_that_masks_is_refused(tiny_config: dict[str, Any]) -> None:
    autoencoder, text_encoder, _ = build_networks(tiny_config)
    with pytest.raises(ValueError, match="mask_padding=false"):
        Recipe(tiny_config["backbone"], autoencoder, text_encoder, 1e-3, 0, CPU)


def test_the_arms_have_as_many_parameters() -> None:
    counts = {}
    for arm in (OURS, RECIPE, PATCHED, UNPATCHED):
        values = arm.values({"autoencoder": {"name": "kl"}, "resolution": 64})
        with torch.device("meta"):
            text = build("text_encoder", values["text_encoder"])
            unet = build("backbone", values["backbone"], latent_channels=4, conditioning_dim=text.dim)
        counts[arm.name] = sum(p.numel() for part in (text, unet) for p in part.parameters())
    assert max(counts.values()) <= 1.02 * min(counts.values()), counts
    assert set(counts) == set(ARMS)


def test_both_figures_have_to_reach_the_target() -> None:
    assert Score(0.5, 20.0).reaches(TARGET)
    assert not Score(0.9, 20.1).reaches(TARGET)
    assert not Score(0.49, 5.0).reaches(TARGET)
    assert Score(0.25, 10.0).shortfall(TARGET) == 2.0
    assert Score(0.9, 30.0).shortfall(TARGET) == 1.5
    assert Score(0.0, 1.0).shortfall(TARGET) == math.inf
    assert Score(0.0, 1.0).shortfall(Score(0.0, 2.0)) == 0.5


def test_the_best_is_the_nearest_of_those_that_are_as_adherent() -> None:
    scores = {2.0: Score(0.87, 43.0), 3.0: Score(0.953, 140.0), 4.5: Score(0.961, 419.0)}
    assert best_of(scores) == 3.0
    assert best_of({**scores, 4.5: Score(0.99, 419.0)}) == 4.5
    assert best_of({1.0: Score(0.0, 60.0), 2.0: Score(0.0, 50.0)}) == 2.0


def make_measurement(folder: Path, **changed: Any) -> Measurement:
    given: dict[str, Any] = {"minutes": 1.0, "points": 1, "pictures": 4, "steps": 2, "clock": ClockKind.cpu}
    return Measurement(
        folder, Settings(**given | {"threads": 1, "demo": "demo", "shards": "shards"} | changed)
    )


@pytest.mark.parametrize("needed", [1 / 100, 1 / 32, 1 / 8, 1 / 7, 0.9, 2.0])
def test_the_shortest_horizon_at_the_target_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: float
) -> None:
    def ended(self: Measurement, arm: Any, chosen: Choice, seed: int, horizon: float, target: Score) -> Tried:
        reached = horizon >= needed
        return Tried(arm.name, seed, horizon, Point("", 1, 1.0, 1.0, 0.0, 0.0), target, 3.0, reached)

    monkeypatch.setattr(Measurement, "ended", ended)
    measurement = make_measurement(tmp_path)
    found = measurement.horizon(OURS, CHOICE, TARGET)
    assert found == next((share for share in HORIZONS if share >= needed), HORIZONS[-1])
    climb = measurement.climb(OURS, CHOICE, 0, HORIZONS[0], TARGET)
    assert [tried.horizon for tried in climb] == list(HORIZONS[: HORIZONS.index(found) + 1])
    assert climb[-1].reached == (needed <= 1)


def test_a_folder_keeps_to_its_settings(tmp_path: Path) -> None:
    make_measurement(tmp_path)
    make_measurement(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        make_measurement(tmp_path, minutes=2.0)


def test_pauses_are_not_counted() -> None:
    watch = Stopwatch(time.time() - 100)
    before = watch.read()
    with watch.pause():
        time.sleep(0.2)
        sum(range(10**6))
    after = watch.read()
    assert 100 <= before.wall <= after.wall < before.wall + 0.1
    assert after.cpu < before.cpu + 0.05


def test_a_training_ends_by_seconds_or_by_images() -> None:
    given: dict[str, Any] = {"arm": "ours", "demo": "", "shards": "", "lr": 1.0, "seed": 0, "points": 1}
    given |= {"threads": 1, "compute": {}, "clock": ClockKind.cpu}
    spent = Spent(wall=50.0, cpu=5.0)
    assert Training(**given, seconds=10.0, images=0).done(spent, 10**9) == 0.5
    assert Training(**given, seconds=0.0, images=400).done(spent, 100) == 0.25


def test_a_plan_keeps_its_shares() -> None:
    plan = scaled(Plan(24_000, 32, 1_000, 0.5, 1_500), 2_400)
    assert (plan.images, plan.batch_size, plan.warmup_images) == (2_400, 32, 100)
    assert (plan.cooldown_fraction, plan.ema_halflife_images) == (0.5, 150)


def test_ratios_are_averaged_by_their_logarithms() -> None:
    found = spread([2.0, 4.0, 8.0])
    assert found.value == pytest.approx(4.0)
    assert found.interval is not None
    low, high = found.interval
    assert low * high == pytest.approx(16.0)
    assert low < 1, "three seeds that differ by four say little"
    assert spread([3.0]).interval is None


def test_wrong_options_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minutes"):
        quality(minutes=0)
    with pytest.raises(SystemExit):
        bench.main(["quality", "--clock", "sun"])
    missing = ["quality", "--demo", str(tmp_path / "none"), "--folder", str(tmp_path / "bench")]
    assert bench.main(missing) == bench.CHECKPOINT
    assert "make demo" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_measurement_from_end_to_end(
    tmp_path: Path, tiny_config: dict[str, Any], make_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from evaluation.adherence import AdherenceJudge

    monkeypatch.setattr("scripts.benches.quality_measurement.find_judge", lambda folder: judge)
    judge = AdherenceJudge().eval()
    demo = make_run(tmp_path / "demo", {**tiny_config, "resolution": 32})
    for split, seed in (("train", 0), ("val", 1)):
        write_landscapes(tmp_path / "shards" / split, 64, 32, seed, 64, 1)
    words = ["quality", "--minutes", "0.1", "--seeds", "1", "--points", "1", "--pictures", "4"]
    words += ["--demo", str(demo), "--shards", str(tmp_path / "shards"), "--folder", str(tmp_path / "bench")]
    assert bench.main([*words, "--part", "recipe"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "time" not in told
    assert bench.main(words) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["target"] == told["target"], "fixed before ours is measured, and not made again"
    assert document["time"] > 0
    assert document["images"] > 0
    assert document["trainings"][0]["arm"] == "recipe"
    assert document["trainings"][-1]["arm"] == "ours"
