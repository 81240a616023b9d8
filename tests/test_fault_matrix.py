"""The fault matrix in docs/ is whole: every row that is promised is there, and every test it names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENT = PROJECT / "docs" / "fault-matrix.md"
#: Rows that must be there, and that have a test each.
PROMISED = {*range(1, 36), *range(39, 49)}
TEST = re.compile(r"(tests/[\w/]+\.py)::(test_\w+)")


def rows(text: str) -> dict[int, tuple[str, str, list[str]]]:
    """Row number -> fault, what happens, and the names of its tests; ValueError for a line that is no row."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("| ") or line.startswith("| row "):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) != 4 or not cells[0].isdigit() or not all(cells):
            raise ValueError(f"no row: {line}")
        names = cells[3].split(", ")
        number = int(cells[0])
        if number in found or not all(TEST.fullmatch(name) for name in names):
            raise ValueError(f"row {number} is there twice, or names no test: {line}")
        found[number] = (cells[1], cells[2], names)
    return found


@cache
def defined_in(path: Path) -> frozenset[str]:
    """The names of the tests that a file defines, also in its classes; none where there is no file."""
    if not path.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef))


def absent(found: dict[int, tuple[str, str, list[str]]]) -> list[str]:
    """The tests that rows name and that do not exist."""
    named = [(number, name.partition("::")) for number, (_, _, names) in found.items() for name in names]
    return [
        f"row {number}: {path}::{test}"
        for number, (path, _, test) in named
        if test not in defined_in(PROJECT / path)
    ]


def test_every_promised_row_is_there_and_every_test_exists() -> None:
    found = rows(DOCUMENT.read_text(encoding="utf-8"))
    assert PROMISED - found.keys() == set()
    assert list(found) == sorted(found)
    assert absent(found) == []


@pytest.mark.parametrize(
    "line",
    ["| 3 | a fault | what happens |", "| x | a | b | tests/test_a.py::test_b |", "| 3 | a | b | |",
     "| 3 | a | b | by hand |", "| 1 | a | b | tests/test_a.py::test_b |"],
)  # fmt: skip
def test_a_line_that_is_no_row_is_found(line: str) -> None:
    with pytest.raises(ValueError, match="row"):
        rows("| 1 | one | happens | tests/test_a.py::test_b |\n" + line)


def test_a_test_that_is_gone_is_found() -> None:
    here = "tests/test_fault_matrix.py"
    text = (
        f"| 1 | a | b | {here}::test_a_test_that_is_gone_is_found, {here}::test_gone, tests/no.py::test_a |"
    )
    assert absent(rows(text)) == [f"row 1: {here}::test_gone", "row 1: tests/no.py::test_a"]
