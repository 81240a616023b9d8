"""Files of prompts: the published ones, our own, and all kinds of broken ones."""

import json
from pathlib import Path

import pytest

from data.shard_index import DataError
from evaluation.prompts import LONGEST, by_category, read_prompts

DSG_HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
)


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "prompts"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "count", "form", "first"),
    [
        ("geneval.jsonl", 553, "geneval", {"single_object": 80, "two_object": 99, "counting": 80}),
        ("parti.tsv", 1_632, "parti", {"Abstract": 51, "Vehicles": 104, "Illustrations": 124}),
        ("dsg-1k-anns.csv", 1_060, "dsg", {"whoops": 100, "localized_narratives": 100, "posescript": 100}),
    ],
)
def test_the_published_files_are_read(
    shared_data: Path, name: str, count: int, form: str, first: dict[str, int]
) -> None:
    suite = read_prompts(shared_data / "prompts" / name)
    assert (suite.format, len(suite.prompts)) == (form, count)
    groups = by_category(suite.prompts)
    assert {key: len(groups[key]) for key in list(groups)[:3]} == first
    some = suite.sampled(3 * len(groups), seed=1)
    assert {len(numbers) for numbers in by_category(some).values()} == {3}
    assert suite.sampled(3 * len(groups), seed=1) == some != suite.sampled(3 * len(groups), seed=2)
    assert set(map(id, suite.sampled(5, seed=1))) <= set(map(id, some))
    assert suite.sampled(10**6) == suite.prompts


def test_questions_keep_their_tree(shared_data: Path) -> None:
    suite = read_prompts(shared_data / "prompts" / "dsg-1k-anns.csv")
    assert sum(len(prompt.record["questions"]) for prompt in suite.prompts) == 8_182
    assert suite.prompts[0].record["questions"][1] == {
        "id": "2", "parents": ["1"], "category": "attribute", "question": "Is the rubix cube purple?"
    }  # fmt: skip
    stray = next(prompt for prompt in suite.prompts if prompt.id == "posescript_69")
    assert stray.record["questions"][8]["parents"] == ["5"]


def test_our_own_files(tmp_path: Path) -> None:
    suite = read_prompts(written(tmp_path, "\ufeffa cat\r\n\r\n a  “dog” \tpets\r\n雪山\xa0と海\n"))
    assert [(p.text, p.category, p.id) for p in suite.prompts] == [
        ("a cat", "all", "0"), ("a “dog”", "pets", "2"), ("雪山 と海", "all", "3")
    ]  # fmt: skip
    lines = [{"prompt": "hills", "category": "land", "sky": "clear"}, {"prompt": "sea", "id": "s"}]
    suite = read_prompts(written(tmp_path, "\n".join(map(json.dumps, lines))))
    assert suite.format == "jsonl"
    assert [(p.text, p.category, p.id) for p in suite.prompts] == [
        ("hills", "land", "0"),
        ("sea", "all", "s"),
    ]
    assert suite.prompts[0].record["sky"] == "clear"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ("\n \n\t\n", "holds no prompts"),
        (b"caf\xe9 at noon", "byte 3 is not UTF-8"),
        ("a cat\n" + "x" * (LONGEST + 1), "line 2: a prompt of 4,001 characters"),
        (b"\x00\x01\x02 \x7fELF", "line 1: the prompt holds the control character"),
        ('{"prompt": "a"}\n{"prompt": 3}', "line 2: no text under 'prompt'"),
        ('{"prompt": "a"}\nno json', "line 2: no JSON"),
        ('{"prompt": "a", "category": ["b"]}', "line 1: category"),
        ("{" * 100_000, "line 1: no JSON"),
        ('{"prompt": " "}', "line 1: the prompt is empty"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}', "id '1' is there twice"),
        ("Prompt\tChallenge\na\tb", "no column Category"),
        ("Prompt\tCategory\tChallenge\tNote\na cat", "line 2: no Category"),
        ("Prompt\tCategory\tChallenge\tNote\n", "holds no prompts"),
        ("item_id,text\nwhoops_1,a cat", "no column proposition_id"),
        (DSG_HEADER + 'whoops_1,"a cat', "after line 1: unexpected end of data"),
        (DSG_HEADER + "whoops_1,a cat", "line 2: no proposition_id"),
    ],
)
def test_broken_files_are_refused_in_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(written(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "prompts") in str(caught.value)
    assert len(str(caught.value)) < 400


def test_missing_and_endless_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            read_prompts(path)
    monkeypatch.setattr("evaluation.prompts.LARGEST", 4)
    with pytest.raises(DataError, match="split it"):
        read_prompts(written(tmp_path, "a cat"))
