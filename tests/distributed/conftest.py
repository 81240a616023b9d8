"""The process that the tests' runs are forked from, and the runs they share."""

import shutil
from collections.abc import Iterator

import pytest

from scripts.faults.zygote import Zygote
from tests.distributed.runs import Runs, environment


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    """The process all runs are forked from."""
    with Zygote(tmp_path_factory.mktemp("zygote") / "log") as made:
        yield made


@pytest.fixture(scope="session")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """All whole runs of these tests."""
    place = tmp_path_factory.mktemp("runs")
    yield Runs(place, zygote)
    shutil.rmtree(place, ignore_errors=True)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody launched the tests."""
    for name in environment(0, 1, 0):
        monkeypatch.delenv(name, raising=False)
