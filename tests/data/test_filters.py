"""Filters: what they keep, what they never bring back, and what they refuse."""

import pickle
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.filters import Filter
from data.shard_index import DataError, ShardIndex, build_index
from data.writer import write_shard

RECORDS = [
    b'{"score": 5.5, "license": "cc0", "nsfw": false, "width": 7}',
    b'{"score": 4, "license": "cc-by", "nsfw": true}',
    b'{"license": "all rights", "nsfw": false, "odd": "x"}',
    b'{"score": null, "odd": 3}',
    None,
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, make_image) -> ShardIndex:
    path = tmp_path_factory.mktemp("filters") / "0.tar"

    def samples():
        for i, record in enumerate(RECORDS):
            fields = {"jpg": make_image(i, (24 + 8 * i, 16))}
            if record is not None:
                fields["json"] = record
            if i != 2:
                fields["txt"] = b"one two three"[: 4 * i]
            yield f"{i}", fields

    write_shard(path, samples())
    return build_index(path)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", [0, 1, 2, 3, 4]),
        ("score >= 5", [0]),
        ("not score >= 5", [1]),  # never what has no score
        ("score < 100 or license == 'all rights'", [0, 1, 2]),
        ("score < 100 and license != 'cc0'", [1]),
        ("license in ('cc0', 'cc-by')", [0, 1]),
        ("license not in ('cc0', 'cc-by')", [2]),
        ("not license in ('cc0',)", [1, 2]),
        ("nsfw", [1]),
        ("not nsfw", [0, 2]),
        ("nsfw == False", [0, 2]),
        ("4 < score <= 5.5", [0]),
        ("not (4 < score <= 5.5)", [1]),
        ("score in (4, 9)", [1]),
        ("score > -1e3", [0, 1]),
        ("width >= 40", [2, 3, 4]),  # 7 by the JSON of the first, measured for the others
        ("width < 10", [0]),
        ("width == height", []),
        ("aspect > 2.4", [2, 3, 4]),
        ("words == 0", [0]),
        ("words >= 2", [3, 4]),
        ("odd == 'x'", [2]),
        ("odd > 2", [3]),
        ("odd in (3, 'x')", [2, 3]),
        ("'cc0' == license", [0]),
    ],
)
def test_what_is_kept(index: ShardIndex, text: str, kept: list[int]) -> None:
    wanted = Filter(text)
    wanted.check(index.number_names, index.string_names)
    assert np.flatnonzero(wanted.keep(index)).tolist() == kept
    assert np.flatnonzero(pickle.loads(pickle.dumps(wanted)).keep(index)).tolist() == kept


TESTS = ["score > 4", "nsfw", "license == 'cc0'", "words > 0", "width < 30"]
EXPRESSIONS = st.recursive(
    st.sampled_from(TESTS),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(lambda t: f"({' '.join(t)})"),
        inner.map(lambda text: f"not {text}"),
    ),
    max_leaves=6,
)


def kleene(text: str, values: dict[str, bool | None]) -> bool | None:
    """The same logic on single values, unknown as None: and is min, or is max, of false < unknown < true."""
    number = {False: 0, None: 1, True: 2}
    for name, value in values.items():
        text = text.replace(name, str(number[value]))
    words = text.replace("(", " ( ").replace(")", " ) ").split()

    def test() -> int:
        word = words.pop(0)
        if word == "not":
            return 2 - test()
        if word == "(":
            left, sign, right = test(), words.pop(0), test()
            assert words.pop(0) == ")"
            return min(left, right) if sign == "and" else max(left, right)
        return int(word)

    return {0: False, 1: None, 2: True}[test()]


@settings(max_examples=40, deadline=None)
@given(text=EXPRESSIONS)
def test_logic_is_three_valued(index: ShardIndex, text: str) -> None:
    kept = Filter(text).keep(index)
    for row in range(index.count):
        values: dict[str, bool | None] = {}
        for name in TESTS:
            true, false = Filter(name).keep(index)[row], Filter(f"not ({name})").keep(index)[row]
            values[name] = True if true else False if false else None
        assert kept[row] == (kleene(text, values) is True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os').system('x')", "no name, number or text"),
        ("score.real > 1", "score.real is no name, number or text"),
        ("(lambda: 1)() > 2", "no name, number or text"),
        ("[x for x in y]", "no name, number or text"),
        ("score + 1 > 2", "score \\+ 1 is no name"),
        ("f'{score}' == 'x'", "no name, number or text"),
        ("score > (1, 2)", "no comparison by"),
        ("score is 1", "no comparison by"),
        ("license < 'b'", "orders text"),
        ("1 < 2", "compares no name"),
        ("5", "5 compares nothing"),
        ("score in ()", "is no name in \\(a, b\\)"),
        ("score in 5", "is no name in \\(a, b\\)"),
        ("score in (width, 2)", "holds a name among its values"),
        ("score >", "no expression at '>'|no expression"),
        ("score = 5", "no expression"),
        ("score > 5; x", "no expression"),
        ("(" * 4000 + "a" + ")" * 4000, "no expression"),
        ("a > 1" + "0" * 20_000, "20005 characters"),
        ("a > " + "9" * 400, "is no name, number or text"),
        ("a\0 > 1", "no expression"),
    ],
)
def test_only_comparisons_are_read(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Filter(text)
    assert "\n" not in str(caught.value)
    assert "where" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_a_filter_or_a_data_error(text: str) -> None:
    with suppress(DataError):
        Filter(text)


def test_unknown_names_are_guessed(index: ShardIndex) -> None:
    for text, message in (
        ("scores > 1", "no sample has 'scores'; did you mean score\\? \\(names: aspect, height"),
        ("licence == 'cc0'", "did you mean license"),
        ("license > 3", "license holds text, but is compared with a number"),
        ("license == odd", "license holds text"),
        ("score == 'a'", "score holds numbers, but is compared with text"),
    ):
        with pytest.raises(DataError, match=message):
            Filter(text).check(index.number_names, index.string_names)


def test_clauses_and_plain_form() -> None:
    wanted = Filter("( a>1 )and b in('x',)and (c<2 or d)")
    assert [str(clause) for clause in wanted.clauses()] == ["a > 1", "b in ('x',)", "c < 2 or d"]
    assert str(Filter("a>1")) == str(Filter(" (a  > 1) ")) == "a > 1"
    assert not Filter("  ")


def test_names_that_only_other_shards_have_are_unknown(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", [("a", {"json": b"{}"})])
    index = build_index(tmp_path / "0.tar")
    assert Filter("score > 1").keep(index).tolist() == [False]
    assert Filter("not (score > 1 or license == 'x')").keep(index).tolist() == [False]
