"""Files of arrays: the same in, the same out, and no damage goes unseen."""

import random
from pathlib import Path

import numpy as np
import pytest

from data.arrays import UNREADABLE, join_texts, pack_arrays, read_arrays, read_meta, text_at, write_arrays

ARRAYS = {
    "a": np.arange(6, dtype=np.int64).reshape(2, 3),
    "empty": np.zeros((4, 0)),
    "words": np.array([1, 65535], np.uint16),
    "text": np.frombuffer(b"xyz", np.uint8),
}


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    write_arrays(path, {"kind": "test", "name": "Ünïcode"}, ARRAYS)
    meta, arrays = read_arrays(path, "test")
    assert meta["name"] == read_meta(path)["name"] == "Ünïcode"
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert np.array_equal(arrays[name], array)
    assert pack_arrays({"kind": "test", "name": "Ünïcode"}, ARRAYS) == path.read_bytes()
    assert sorted(read_arrays(path, names=["words", "absent"])[1]) == ["words"]
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="it is no catalogue"):
        read_arrays(path, "catalogue")


def test_every_flip_and_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    write_arrays(path, {"kind": "test"}, ARRAYS)
    data, found = path.read_bytes(), 0
    for bit in random.Random(0).sample(range(len(data) * 8), 1500):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            meta, arrays = read_arrays(path, "test")
        except UNREADABLE:
            found += 1
            continue
        assert meta["kind"] == "test"
        assert all(np.array_equal(arrays[name], ARRAYS[name]) for name in ARRAYS)
    assert found > 1000
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        with pytest.raises(UNREADABLE):
            read_arrays(path, "test")


def test_texts_are_joined_and_found_again() -> None:
    texts = ["", "a/b.tar", "ä", ""]
    joined, ends = join_texts(texts)
    assert [text_at(joined, ends, i) for i in range(4)] == texts
