"""A filter over samples, an expression: `Filter("aesthetic >= 5 and license in ('cc0', 'cc-by')")`.

Names are those at the top level of the JSON field, then `width`, `height` (pixels, measured), `aspect` (width
over height) and `words` (of the caption). The text is parsed and walked, never run: names, numbers, strings,
comparisons (chained too), `in` and `not in` a tuple, `and`, `or`, `not`, brackets. A name alone is true where
its value is not 0; two names are compared as numbers. It is evaluated on the arrays of the
index, a shard at a time.

A sample that lacks a value is left out, whichever way it is asked: a comparison with a value that is absent
is neither true nor false but unknown, `not unknown` is unknown, `unknown or true` is true, `unknown and
false` is false, and only what is true is kept (three-valued logic, Kleene 1938, as SQL has it). So neither
`aesthetic > 5` nor `not aesthetic > 5` keeps a sample without `aesthetic`.
"""

import ast
import difflib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np

from data.shard_index import NO_CAPTION, DataError, ShardIndex, string_hash

MEASURED = ("aspect", "height", "width", "words")
ARRAYS = ("heights", "numbers", "strings", "widths", "words")
MAX_LENGTH = 10_000
EXAMPLE = "aesthetic >= 5 and width >= 512 and license in ('cc0', 'cc-by')"

_ORDER: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
    ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip


@dataclass(frozen=True)
class _Truth:
    """Where something is true, and where it is false, bool [S] each; neither where it is unknown."""

    true: np.ndarray
    false: np.ndarray

    def __and__(self, other: "_Truth") -> "_Truth":
        return _Truth(self.true & other.true, self.false | other.false)

    def __or__(self, other: "_Truth") -> "_Truth":
        return _Truth(self.true | other.true, self.false & other.false)

    def __invert__(self) -> "_Truth":
        return _Truth(self.false, self.true)


class Filter:
    """What keeps a sample: an expression, empty for every sample. `str(filter)` is its plain form.

    Raises DataError for what is no such expression.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text.strip()
        self._tree = _parse(self.text) if self.text else None

    def __bool__(self) -> bool:
        return self._tree is not None

    def __str__(self) -> str:
        """Returns the expression with the blanks and brackets of Python's own printing; "" if empty."""
        return "" if self._tree is None else ast.unparse(self._tree)

    def __getstate__(self) -> dict[str, str]:
        return {"text": self.text}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__init__(state["text"])  # type: ignore[misc]

    def clauses(self) -> tuple["Filter", ...]:
        """Returns the parts that its outermost `and` joins, itself if there is none."""
        if isinstance(self._tree, ast.BoolOp) and isinstance(self._tree.op, ast.And):
            return tuple(Filter(ast.unparse(part)) for part in self._tree.values)
        return (self,)

    def names(self) -> dict[str, set[str]]:
        """Returns each name that it uses, with what it is compared with: "number", "string" or both."""
        used: dict[str, set[str]] = {}
        for node in _tests(self._tree) if self._tree else ():
            kinds = {_kind(part) for part in _operands(node)} - {"name"} or {"number"}
            for part in _operands(node):
                if isinstance(part, ast.Name):
                    used.setdefault(part.id, set()).update(kinds)
        return used

    def check(self, numbers: Sequence[str], strings: Sequence[str]) -> None:
        """Raises DataError for a name that no sample has; `numbers` and `strings` are those of the JSON."""
        for name, kinds in self.names().items():
            known = {"number": {*numbers, *MEASURED}, "string": set(strings)}
            for kind in sorted(kinds):
                if name in known[kind]:
                    continue
                if name in known["number"] | known["string"]:
                    other = "text" if name in known["string"] else "numbers"
                    asked = "a number" if kind == "number" else "text"
                    raise DataError(
                        f"where={self.text!r}: {name} holds {other}, but is compared with {asked}"
                    )
                every = sorted(known["number"] | known["string"])
                close = difflib.get_close_matches(name, every, 1, 0.5)
                guess = f"did you mean {close[0]}? " if close else ""
                raise DataError(
                    f"where={self.text!r}: no sample has {name!r}; {guess}(names: {', '.join(every[:40])})"
                )

    def keep(self, index: ShardIndex) -> np.ndarray:
        """Returns bool [S]: which samples of a shard are kept; its arrays `ARRAYS` must be loaded."""
        if self._tree is None:
            return np.ones(index.count, bool)
        return _truth(self._tree, _Columns(index)).true


class _Columns:
    """The values of a shard's samples by name: numbers float64 [S], NaN if absent, hashes uint64 [S] or 0."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index

    def numbers(self, name: str) -> np.ndarray:
        """Returns a number of each sample: of the JSON where it is there, else as measured."""
        measured = self._measured(name)
        if name not in self.index.number_names:
            return measured
        values = self.index.arrays["numbers"][:, self.index.number_names.index(name)]
        return np.where(np.isnan(values), measured, values)

    def strings(self, name: str) -> np.ndarray:
        """Returns the hash of a string of each sample."""
        if name not in self.index.string_names:
            return np.zeros(self.index.count, np.uint64)
        return self.index.arrays["strings"][:, self.index.string_names.index(name)]

    def _measured(self, name: str) -> np.ndarray:
        absent = np.full(self.index.count, np.nan)
        if name not in MEASURED:
            return absent
        if name == "words":
            words = self.index.arrays["words"]
            return np.where(words == NO_CAPTION, np.nan, words)
        widths, heights = (self.index.arrays[side].astype(np.float64) for side in ("widths", "heights"))
        known = (widths > 0) & (heights > 0)
        aspects = np.divide(widths, heights, out=absent.copy(), where=known)
        return np.where(known, {"width": widths, "height": heights, "aspect": aspects}[name], np.nan)


def _parse(text: str) -> ast.expr:
    if len(text) > MAX_LENGTH:
        raise DataError(f"where has {len(text)} characters, at most {MAX_LENGTH} are read; write it shorter")
    try:
        tree = ast.parse(text, mode="eval").body
        for test in _tests(tree):
            _check_test(test)
        return tree
    except _RefusedError as error:
        raise DataError(f"where={text[:200]!r}: {error}; write it as where={EXAMPLE!r}") from error
    except SyntaxError as error:
        where = (
            f" at {(error.text or text)[max(0, (error.offset or 1) - 1) :][:20]!r}" if error.offset else ""
        )
        raise DataError(
            f"where={text[:200]!r}: no expression{where} ({error.msg}); write it as where={EXAMPLE!r}"
        ) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"where={text[:200]!r}: no expression ({error}); write it shorter") from error


class _RefusedError(Exception):
    """Says which part of an expression is not allowed."""


def _tests(node: ast.expr) -> Iterator[ast.expr]:
    """Yields the comparisons and names that `and`, `or` and `not` join."""
    if isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _tests(value)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield from _tests(node.operand)
    else:
        yield node


def _operands(test: ast.expr) -> Iterator[ast.expr]:
    """Yields the names and constants of a test, those of tuples too."""
    parts = [test.left, *test.comparators] if isinstance(test, ast.Compare) else [test]
    for part in parts:
        yield from part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]


def _check_test(test: ast.expr) -> None:
    for part in _operands(test):
        _kind(part)
    if not isinstance(test, ast.Compare):
        if not isinstance(test, ast.Name):
            raise _RefusedError(f"{ast.unparse(test)} compares nothing")
        return
    left = test.left
    for sign, right in zip(test.ops, test.comparators, strict=True):
        _check_pair(left, sign, right)
        left = right


def _check_pair(left: ast.expr, sign: ast.cmpop, right: ast.expr) -> None:
    shown = ast.unparse(ast.Compare(left, [sign], [right]))
    several = isinstance(right, ast.Tuple | ast.List | ast.Set)
    if isinstance(sign, ast.In | ast.NotIn):
        if not several or not list(_operands(right)) or not isinstance(left, ast.Name):
            raise _RefusedError(f"{shown} is no name in (a, b)")
        if any(isinstance(part, ast.Name) for part in _operands(right)):
            raise _RefusedError(f"{shown} holds a name among its values")
        return
    if type(sign) not in _ORDER or several or isinstance(left, ast.Tuple | ast.List | ast.Set):
        raise _RefusedError(f"{shown} is no comparison by < <= > >= == !=")
    if not isinstance(left, ast.Name) and not isinstance(right, ast.Name):
        raise _RefusedError(f"{shown} compares no name")
    if "string" in (_kind(left), _kind(right)) and not isinstance(sign, ast.Eq | ast.NotEq):
        raise _RefusedError(f"{shown} orders text, which is only compared by ==, != and in")


def _kind(part: ast.expr) -> str:
    """Returns "name", "number" or "string"; raises _RefusedError for anything else."""
    if isinstance(part, ast.Name):
        return "name"
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub | ast.UAdd):
        if isinstance(part.operand, ast.Constant) and _kind(part.operand) == "number":
            return "number"
    elif isinstance(part, ast.Constant):
        if isinstance(part.value, str):
            return "string"
        if isinstance(part.value, bool | float) or (
            isinstance(part.value, int) and abs(part.value) < 1 << 1000
        ):
            return "number"
    raise _RefusedError(f"{ast.unparse(part)[:60]} is no name, number or text")


def _truth(node: ast.expr, columns: _Columns) -> _Truth:
    if isinstance(node, ast.BoolOp):
        parts = [_truth(value, columns) for value in node.values]
        return reduce(operator.and_ if isinstance(node.op, ast.And) else operator.or_, parts)
    if isinstance(node, ast.UnaryOp):
        return ~_truth(node.operand, columns)
    if isinstance(node, ast.Name):
        values = columns.numbers(node.id)
        return _Truth((values != 0) & ~np.isnan(values), values == 0)
    assert isinstance(node, ast.Compare)
    sides = pairwise([node.left, *node.comparators])
    pairs = [
        _compare(left, sign, right, columns) for (left, right), sign in zip(sides, node.ops, strict=True)
    ]
    return reduce(operator.and_, pairs)


def _compare(left: ast.expr, sign: ast.cmpop, right: ast.expr, columns: _Columns) -> _Truth:
    if isinstance(sign, ast.In | ast.NotIn):
        assert isinstance(right, ast.Tuple | ast.List | ast.Set)
        return _among(left, right.elts, isinstance(sign, ast.NotIn), columns)
    if "string" in (_kind(left), _kind(right)):
        one, other = (_hashes(part, columns) for part in (left, right))
        known = (one != 0) & (other != 0)
    else:
        one, other = (_values(part, columns) for part in (left, right))
        known = ~np.isnan(one) & ~np.isnan(other)
    holds = np.broadcast_to(_ORDER[type(sign)](one, other), known.shape)
    return _Truth(known & holds, known & ~holds)


def _among(name: ast.expr, values: Sequence[ast.expr], negated: bool, columns: _Columns) -> _Truth:
    """Returns where a name's number or string is one of the values; unknown where it has neither."""
    assert isinstance(name, ast.Name)
    kinds = {_kind(value) for value in values}
    held = np.zeros(columns.index.count, bool)
    known = np.zeros(columns.index.count, bool)
    if "string" in kinds:
        hashes = columns.strings(name.id)
        wanted = [_hashes(v, columns) for v in values if _kind(v) == "string"]
        held |= np.isin(hashes, np.array(wanted, np.uint64))
        known |= hashes != 0
    if "number" in kinds:
        numbers = columns.numbers(name.id)
        held |= np.isin(
            numbers, np.array([float(_values(v, columns)) for v in values if _kind(v) == "number"])
        )
        known |= ~np.isnan(numbers)
    truth = _Truth(known & held, known & ~held)
    return ~truth if negated else truth


def _values(part: ast.expr, columns: _Columns) -> Any:
    """Returns a part's numbers, float64 [S] for a name, one number for a constant."""
    if isinstance(part, ast.Name):
        return columns.numbers(part.id)
    return np.float64(ast.literal_eval(part))


def _hashes(part: ast.expr, columns: _Columns) -> Any:
    """Returns a part's hashes, uint64 [S] for a name, one hash for a constant."""
    if isinstance(part, ast.Name):
        return columns.strings(part.id)
    assert isinstance(part, ast.Constant)
    return np.uint64(string_hash(part.value)) if isinstance(part.value, str) else np.uint64(0)
