"""Descriptions of datasets: small, and their differences are said in lines."""

import json

import pytest

from data.changes import describe_shards, diff


def described(counts: list[int], changed: frozenset[int] = frozenset(), **more: object) -> dict[str, object]:
    rows = [
        (f"s/{n:05d}.tar", f"{n * 7 + (n in changed):064x}"[::-1], count)
        for n, count in enumerate(counts)
        if count
    ]
    return {"where": "", "unique": False, "low": "0", "high": f"{1 << 64:x}", **describe_shards(rows), **more}


def test_few_shards_are_told_apart() -> None:
    before = described([1000, 2000, 3000, 1000, 5, 0])
    now = described([1000, 2000, 0, 998, 5, 1000], frozenset({3, 4}), where="width >= 512", unique=True)
    assert diff(before, before) == []
    assert diff(before, now) == [
        "filter was none, now 'width >= 512'",
        "unique was off, now on",
        "- 00002.tar (3,000 samples)",
        "~ 00003.tar: 1,000 -> 998 samples, other bytes",
        "~ 00004.tar: 5 samples, other bytes",
        "+ 00005.tar (1,000 samples)",
    ]
    assert diff(before, {**before, "low": f"{1 << 62:x}"}) == [
        "split was 100.0000% of the keys, from 0.0000% on (data.val_fraction), "
        "now 75.0000% of the keys, from 25.0000% on (data.val_fraction)"
    ]


@pytest.mark.parametrize("count", [1001, 20_000])
def test_many_shards_are_described_in_groups(count: int) -> None:
    before = described([1000] * count)
    assert 256 < len(before["groups"]) < 2100
    assert len(json.dumps(before)) < 100_000
    assert diff(json.loads(json.dumps(before)), before) == []
    (line,) = diff(before, described([1000] * count, frozenset({700})))
    assert line.startswith("~ ")
    assert "other bytes" in line
    without = [1000] * count
    without[500] = 0
    lines = diff(before, described(without))
    assert 1 <= len(lines) <= 2
    assert any("- " in line or "~ " in line for line in lines)


def test_lines_are_bounded_and_unlike_sizes_are_summed() -> None:
    lines = diff(described([5] * 900), described([6] * 900))
    assert len(lines) == 25
    assert lines[-1] == "... and 876 more changes"
    assert diff(described([5] * 900), described([5] * 9000)) == [
        "~ 900 shards of 4,500 samples -> 9,000 shards of 45,000 samples"
    ]
    assert diff({}, described([5])) == ["~ 0 shards of 0 samples -> 1 shards of 5 samples"]


def test_folders_that_all_share_are_left_out() -> None:
    rows = [("https://example.org/a/x/0.tar", "0" * 64, 1), ("https://example.org/a/y/0.tar", "1" * 64, 1)]
    assert list(describe_shards(rows)["shards"]) == ["x/0.tar", "y/0.tar"]
    assert list(describe_shards(rows[:1])["shards"]) == ["0.tar"]
    assert describe_shards([]) == {"shards": {}}
