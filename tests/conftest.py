"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("models", "data", "evaluation", "conf", "scripts", "web")


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
