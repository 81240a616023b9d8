"""Fixtures shared by all tests."""

import importlib
import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "data", "evaluation", "conf", "scripts", "web")

# A shell's background jobs ignore SIGINT, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sources() -> dict[str, str]:
    """Path from the project's root -> text, of every Python file but the tests."""
    paths = [*PROJECT.glob("*.py"), *(p for package in PACKAGES for p in (PROJECT / package).rglob("*.py"))]
    return {p.relative_to(PROJECT).as_posix(): p.read_text(encoding="utf-8") for p in sorted(paths)}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real pictures beside the checkout; tests that need it skip where it is missing."""
    folder = PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real pictures of ../shared/data are not on this machine")
    return folder


@pytest.fixture
def rng() -> torch.Generator:
    """A fresh generator with a fixed seed, so that every test draws the same numbers."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> dict[str, Any]:
    """A model's configuration as a checkpoint keeps it: pictures of 16 pixels, latents of 4x4."""
    return {
        "autoencoder": {
            "name": "kl", "channels": [8, 8, 8], "blocks_per_level": 1, "latent_channels": 4,
            "mid_attention": False, "norm_groups": 4,
        },
        "text_encoder": {"name": "transformer", "width": 16, "layers": 1, "heads": 2, "context_length": 12},
        "backbone": {
            "name": "unet", "channels": [8, 16], "blocks_per_level": 1, "transformer_depth": [0, 1],
            "head_dim": 8, "norm_groups": 4, "scale_shift": True, "pooled_conditioning": True,
        },
        "objective": {
            "name": "diffusion", "schedule": {"name": "flow"}, "parameterization": {"name": "flow"},
            "weighting": {"name": "unit"}, "times": {"name": "logit_normal"},
        },
        "sampler": {"name": "multistep"}, "grid": {"name": "uniform"},
        "sampling": {"num_steps": 3, "guidance_scale": 2.0}, "resolution": 16,
    }  # fmt: skip


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Writes the folder of a run that was never trained: `make_run(folder, config, seed)`, random weights."""

    def make(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
        from models.checkpoint import fingerprint, save_checkpoint
        from models.loading import build_networks

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = build_networks(config)
            for network in networks:
                for parameter in network.parameters():  # also what starts at zero
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        named = {
            name: {f"{name}.{key}": value for key, value in network.state_dict().items()}
            for name, network in zip(("autoencoder", "text_encoder", "backbone"), networks, strict=True)
        }
        for stage, names in (("autoencoder", ["autoencoder"]), ("diffusion", ["text_encoder", "backbone"])):
            tensors = {key: value for name in names for key, value in named[name].items()}
            state = {"stage": stage, "images_seen": 8, "dataset": "none"}
            if stage == "diffusion":
                state["autoencoder"] = fingerprint(named["autoencoder"])
            documents = {"config": config, "state": state}
            save_checkpoint(
                folder / stage / "checkpoints", 8, {"ema": tensors, "weights": tensors}, documents
            )
        return folder

    return make


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Runs a script in this process: `command("train", "seed=1")` returns the exit code.

    It is one at the root, such as `train.py`, or one of `scripts/`, such as `evaluate.py`.
    """
    root, threads = logging.getLogger(), torch.get_num_threads()
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    before = (root.level, list(root.handlers))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(script: str, *words: str) -> int:
        from conf.cli import main

        monkeypatch.setattr("sys.argv", [f"{script}.py", *words])
        place = "" if (PROJECT / f"{script}.py").is_file() else "scripts."
        module = importlib.import_module(f"{place}{script}")
        try:
            main(script, vars(module)[script])
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    yield run
    root.level, root.handlers = before
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
