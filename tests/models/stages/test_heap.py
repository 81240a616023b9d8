"""Kept memory is not asked for again: the pages that come are counted in a process of its own."""

import platform
import subprocess
import sys

import pytest

from models.stages import heap
from tests.conftest import PROJECT

ROUNDS, MEGABYTES = 4, 48
COUNT = f"""
import resource
from models.stages.heap import keep_heap

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({ROUNDS}):
        bytearray({MEGABYTES} * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

found = [pages(), keep_heap()]
bytearray({MEGABYTES} * 2**20)
print(*found, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this system's allocator is none of glibc")
def test_what_is_freed_is_there_again() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(after) < int(before) / 10


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: pytest.fail("it was asked"))
    assert not heap.keep_heap()
