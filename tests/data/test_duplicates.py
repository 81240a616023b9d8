"""Repeats in bounded memory, and near duplicates, against brute force."""

from pathlib import Path

import numpy as np
import pytest

from data.duplicates import Banding, group_near, groups_of, image_identities, join_groups, near_pairs
from data.repeats import frequencies, repeats
from data.shard_index import build_index
from data.writer import write_shard


def shards_of(counts: list[int], kinds: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    values = generator.integers(1, 1 << 64, kinds, dtype=np.uint64)
    return [
        np.where(generator.random(n) < 0.1, 0, generator.choice(values, n)).astype(np.uint64) for n in counts
    ]


@pytest.mark.parametrize("budget", [10, 37, 1 << 24])
def test_repeats_are_all_found_in_any_number_of_passes(budget: int) -> None:
    counts = [40, 0, 7, 60, *[3] * 20]
    shards = shards_of(counts, 90)
    found = set()
    for group in repeats(shards.__getitem__, np.array(counts), budget):
        assert group.firsts()[0]
        assert (np.diff(group.values.astype(object)) >= 0).all()
        found |= set(zip(group.values.tolist(), group.shards.tolist(), group.rows.tolist(), strict=True))
        for first, value, shard, row in zip(
            group.firsts(), group.values, group.shards, group.rows, strict=True
        ):
            earlier = [(s, r) for s, values in enumerate(shards) for r in np.flatnonzero(values == value)]
            assert first == ((shard, row) == earlier[0])
    every = [(int(v), s, r) for s, values in enumerate(shards) for r, v in enumerate(values) if v]
    times = {value: sum(v == value for v, _, _ in every) for value, _, _ in every}
    assert found == {place for place in every if times[place[0]] > 1}
    top, distinct = frequencies(shards.__getitem__, np.array(counts), 5, budget)
    assert distinct == len(times)
    assert top == sorted(((v, n) for v, n in times.items() if n > 1), key=lambda p: (-p[1], p[0]))[:5]


def clustered(count: int, near: int, seed: int) -> np.ndarray:
    """Distinct hashes, many of them some flips away from another one, also just beyond `near`."""
    generator = np.random.default_rng(seed)
    hashes = generator.integers(1, 1 << 64, count, dtype=np.uint64)
    for place in range(1, count, 2):
        flips = generator.choice(64, generator.integers(0, near + 3), replace=False)
        other = int(hashes[generator.integers(0, place)])
        for bit in flips:
            other ^= 1 << int(bit)
        hashes[place] = other or 1
    return np.unique(hashes)


@pytest.mark.parametrize("near", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("bands", [None, 1, 2])
def test_near_pairs_are_those_of_brute_force(near: int, bands: int | None) -> None:
    hashes = clustered(700, near, near)
    banding = None if bands is None else Banding(near + bands, bands)
    wanted = np.argwhere(np.triu(np.bitwise_count(hashes[:, None] ^ hashes[None, :]) <= near, 1))
    assert len(wanted) > 50 or near == 0
    assert near_pairs(hashes, near, banding).tolist() == wanted.tolist()


def test_bands_tell_more_hashes_apart_where_there_are_more() -> None:
    few, many = Banding.of(1000, 4), Banding.of(100_000_000, 4)
    assert (few.bands, few.chosen) == (5, 1)
    assert 64 * many.chosen // many.bands >= 24
    assert len(list(many.masks())) <= 70
    assert all(int(mask) for mask in many.masks())


def test_groups_are_what_pairs_link() -> None:
    generator = np.random.default_rng(3)
    pairs = generator.integers(0, 300, (200, 2))
    labels = list(range(300))
    for _ in range(300):  # brute force: until nothing changes
        for i, j in pairs.tolist():
            labels[i] = labels[j] = min(labels[i], labels[j])
    assert groups_of(pairs, 300).tolist() == labels
    chain = np.stack([np.arange(1, 5000), np.arange(4999)], 1)
    assert set(groups_of(chain, 5000).tolist()) == {0}


def test_groups_keep_the_first_and_never_link_what_has_no_hash() -> None:
    a, b = 0xFFFF_0000_FFFF_0000, 0x1234_5678_9ABC_DEF1
    hashes = np.array([0, b, a ^ 1, 0, a, b, a ^ 6], np.uint64)
    assert group_near(hashes, 4).tolist() == [0, 1, 2, 3, 2, 1, 2]
    assert group_near(hashes, 0).tolist() == [0, 1, 2, 3, 4, 1, 6]
    assert group_near(np.full(3000, 7, np.uint64), 4).tolist() == [0] * 3000
    same = np.arange(7)
    same[3] = 0
    assert join_groups([same, group_near(hashes, 4)], 7).tolist() == [0, 1, 2, 0, 2, 1, 2]


def test_images_are_the_same_by_size_checksum_and_dimensions(tmp_path: Path, make_image) -> None:
    samples = [
        ("a", {"jpg": make_image(1), "txt": b"x"}),
        ("b", {"txt": b"y"}),
        ("c", {"jpg": make_image(1)}),
        ("d", {"jpg": make_image(2)}),
        ("e", {"png": make_image(2, form="PNG")}),
    ]
    write_shard(tmp_path / "0.tar", samples)
    identities = image_identities(build_index(tmp_path / "0.tar")).tolist()
    assert identities[1] == 0
    assert identities[0] == identities[2]
    assert len(set(identities)) == 4
