"""Captions are chosen with their probabilities among those that are there."""

from collections import Counter

import pytest

from data.caption_choice import CaptionChoice
from data.index import DataError
from data.transforms import BadSample


def test_choices_follow_their_probabilities() -> None:
    choice = CaptionChoice({"txt": 1.0, "alt": 2.0, "json.long": 1.0, "never": 0.0})
    assert (choice.names, choice.needs_json, choice.is_plain) == (("txt", "alt", "json"), True, False)
    fields = {"txt": b"one", "alt": b" two\n"}
    found = Counter(
        choice.choose(fields.get, {"long": "three"}, lambda i=i: (i + 0.5) / 400) for i in range(400)
    )
    assert found == {"one": 100, "two": 200, "three": 100}
    found = Counter(choice.choose({"txt": b" ", "alt": b"two"}.get, {"long": "three"}, lambda i=i: i / 300)
                    for i in range(300))  # fmt: skip
    assert found == {"two": 200, "three": 100}
    assert choice.choose({}.get, {"long": None}, lambda: 0.5) == ""


def test_json_that_is_no_text_is_bad() -> None:
    choice = CaptionChoice({"json.a": 1.0})
    for value, message in ((["x"], "list"), (3, "int"), ("\ud800", "no UTF-8")):
        with pytest.raises(BadSample, match=rf"json\.a: .*{message}"):
            choice.choose({}.get, {"a": value}, lambda: 0.0)


def test_fields_that_are_nowhere_are_named() -> None:
    with pytest.raises(DataError, match=r"'cap'.* there are jpg, json, txt; correct data.captions"):
        CaptionChoice({"txt": 1.0, "cap": 1.0}).check("s", ("jpg", "txt", "json"), set)
    with pytest.raises(DataError, match=r"'json.b'.* texts there: json.a; correct data.captions"):
        CaptionChoice({"json.b": 1.0}).check("s", ("jpg", "json"), lambda: {"a"})
    CaptionChoice({"txt": 1.0}).check("s", ("jpg",), set)
    for wrong in ({}, {"txt": 0.0}, {"txt": -1.0}):
        with pytest.raises(ValueError, match="captions="):
            CaptionChoice(wrong)
