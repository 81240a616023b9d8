"""Arenas on real servers."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evaluation.arena.blind import blind_png
from evaluation.arena.store import ArenaStore, Entrant, PromptRow
from tests.web.serving import Site, serving
from web.arena import arena_part
from web.live import Live
from web.security import Access, Buckets
from web.voting import Voting

#: Words that no page may tell before a vote.
NAMES = ("zebra-finch", "quokka-mole")
MARKUP = '<img src=x onerror="alert(1)"></script>'


def fill(folder: Path, prompts: int = 40, names: Sequence[str] = NAMES) -> Path:
    """An arena of noise: the first entrant's pictures are flat, so their files are short."""
    rng = torch.Generator().manual_seed(0)
    with ArenaStore.create(folder, 16, 16) as store:
        texts = [f"prompt {k}" for k in range(prompts - 1)] + [MARKUP]
        store.add(
            [Entrant(name) for name in names],
            [PromptRow(f"p{k}", text, "odd" if k % 2 else "even") for k, text in enumerate(texts)],
        )
        for k in range(prompts):
            for number, name in enumerate(names):
                noise = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=rng)
                pixels = noise if number else torch.full_like(noise, k)
                store.add_picture(name, f"p{k}", 0, blind_png(pixels))
    return folder


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An arena that nobody has opened yet."""
    return fill(tmp_path_factory.mktemp("filled") / "arena")


@pytest.fixture
def arena(filled: Path, tmp_path: Path) -> Path:
    """The folder of an arena with two entrants and 40 prompts, of this test alone."""
    return Path(shutil.copytree(filled, tmp_path / "arena"))


@contextmanager
def serve_arena(folder: Path, live: Live | None = None) -> Iterator[tuple[Site, ArenaStore]]:
    """A server of an arena with generous rates, and its store."""
    with ArenaStore.open(folder) as store:
        sign = Access.of("127.0.0.1", 1, store.secret).sign
        parts = arena_part(Voting(store, sign), live)
        with serving(parts, idle_seconds=3.0, visitors=Buckets(1e6, 1e6), secret=store.secret) as site:
            yield site, store


@pytest.fixture(name="serve_arena")
def _serve_arena() -> Callable[..., object]:
    return serve_arena


@pytest.fixture(name="fill")
def _fill() -> Callable[..., Path]:
    return fill
