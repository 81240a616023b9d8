"""Lines of a file that is still written: a last one without its end was never said."""

from pathlib import Path

import pytest

from data.json_lines import read_json_lines


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    for torn in (b"", b'{"ima', b'{"images": 3}', b"\0\0\0", '{"é'.encode()[:-1]):
        path.write_bytes(b'{"images": 1}\n{"images": 2, "loss": NaN}\n' + torn)
        assert [line["images"] for line in read_json_lines(path)] == [1, 2]
    path.write_bytes(b'{"ima')
    assert read_json_lines(path) == []


def test_what_is_whole_and_no_json_is_no_torn_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("nothing\n")
    with pytest.raises(ValueError, match="Expecting value"):
        read_json_lines(tmp_path / "x")
