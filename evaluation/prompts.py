"""Sets of prompts to judge a model by, in the published files' own formats, and what was asked of each.

GenEval's JSON lines (Ghosh et al. 2023, arXiv 2310.11513), PartiPrompts' table (Yu et al. 2022, arXiv
2206.10789), DSG-1k's questions (Cho et al. 2024, arXiv 2310.18235), and your own: JSON lines with `prompt`
and perhaps `category`, or plain text, a prompt a line, perhaps with a tab and its category after it. Which
it is shows in the content. What scores pictures of prompts: `evaluation.scorers`.

    suite = read_prompts(Path("parti.tsv"))
    for category, prompts in by_category(suite.sampled(100, seed=0)).items(): ...
"""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.shard_index import DataError

#: Characters of a prompt, and bytes of a file, at most.
LONGEST, LARGEST = 4_000, 64 << 20
#: The category of prompts for which a file names none.
UNSORTED = "all"
_PARTI = ("Prompt", "Category", "Challenge", "Note")
_DSG = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")


@dataclass(frozen=True)
class Prompt:
    """What is asked for, and all that its file says of it."""

    text: str
    category: str
    id: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptSuite:
    """The prompts of one file, in its order.

    Args:
        format: of the file: geneval, parti, dsg, jsonl or text.
        sha256: of the file, in hexadecimal.
        prompts: at least one; no two have the same id.
    """

    format: str
    sha256: str
    prompts: tuple[Prompt, ...]

    def sampled(self, count: int, seed: int = 0) -> tuple[Prompt, ...]:
        """So many of the prompts, in the file's order; all of them where there are no more.

        Categories have one each in turn until they are out, so small ones are there too. A pure function of
        the file, `count` and `seed`; fewer are among more.
        """
        rng = np.random.Generator(np.random.Philox(key=[seed, 0]))
        numbers: dict[str, list[int]] = {}
        for k in rng.permutation(len(self.prompts)).tolist():
            numbers.setdefault(self.prompts[k].category, []).append(k)
        turns = sorted(
            (turn, category, k) for category, ks in sorted(numbers.items()) for turn, k in enumerate(ks)
        )
        return tuple(self.prompts[k] for k in sorted(k for _, _, k in turns[:count]))


def by_category(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Category -> the numbers of its prompts, categories in the order of their first prompts."""
    groups: dict[str, list[int]] = {}
    for k, prompt in enumerate(prompts):
        groups.setdefault(prompt.category, []).append(k)
    return groups


def read_prompts(path: Path) -> PromptSuite:
    """The prompts of a file, its format found from its content.

    Raises:
        DataError: it cannot be read, is too large, is no UTF-8, holds no prompts, or a line of it is not
            what its format says: the line and the field are named.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(
                f"{path}: larger than {LARGEST >> 20} MiB; split it into several files of prompts"
            )
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path of the prompts") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start:,} is not UTF-8; save the file as UTF-8") from None
    name, read = _format(text)
    prompts = tuple(read(path, text))
    if not prompts:
        raise DataError(f"{path}: holds no prompts; give a prompt a line")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"{path}: id {prompt.id!r} is there twice; give each prompt an id of its own")
        seen.add(prompt.id)
    return PromptSuite(name, hashlib.sha256(content).hexdigest(), prompts)


def _format(text: str) -> tuple[str, Callable[[Path, str], Iterator[Prompt]]]:
    first = text.lstrip().partition("\n")[0].strip()
    if first.startswith("{"):
        geneval = '"include"' in first and '"tag"' in first
        return ("geneval" if geneval else "jsonl"), _json_lines
    if "\t" in first and first.split("\t")[0] == _PARTI[0]:
        return "parti", _parti
    if first.startswith("item_id,"):
        return "dsg", _dsg
    return "text", _text


def _json_lines(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number:,}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: no JSON ({error}); give an object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise DataError(f"{where}: no text under 'prompt'; give an object with a prompt a line")
        category = record.get("category", record.get("tag", UNSORTED))
        known = record.get("id", number - 1)
        if not isinstance(category, str) or not isinstance(known, str | int):
            raise DataError(f"{where}: category {category!r} or id {known!r} is no text; give texts")
        rest = {key: value for key, value in record.items() if key != "prompt"}
        yield _prompt(where, record["prompt"], category, str(known), rest)


def _parti(path: Path, text: str) -> Iterator[Prompt]:
    # Quotes are part of the prompts here.
    for number, row in _rows(path, text, _PARTI, delimiter="\t", quoting=csv.QUOTE_NONE):
        record = {"challenge": row["Challenge"], "note": row["Note"] or ""}
        yield _prompt(f"{path}: line {number:,}", row["Prompt"], row["Category"], str(number - 2), record)


def _dsg(path: Path, text: str) -> Iterator[Prompt]:
    items: dict[str, list[tuple[int, dict[str, str]]]] = {}
    for number, row in _rows(path, text, _DSG):
        items.setdefault(row["item_id"], []).append((number, row))
    for name, rows in items.items():
        number, row = rows[0]
        questions = [
            {
                "id": each["proposition_id"],
                "parents": _parents(each["dependency"]),
                "category": each["category_broad"],
                "question": each["question_natural_language"],
            }
            for _, each in rows
        ]
        source = name.rpartition("_")[0] or UNSORTED
        yield _prompt(f"{path}: line {number:,}", row["text"], source, name, {"questions": questions})


def _parents(dependency: str) -> list[str]:
    """The ids in a list of them; 0 is no parent, and a few rows have a stray word among the numbers."""
    ids = (part.strip() for part in dependency.split(","))
    return [each for each in ids if each.isdecimal() and int(each)]


def _text(path: Path, text: str) -> Iterator[Prompt]:
    for number, line in enumerate(text.split("\n"), 1):
        prompt, _, category = line.strip().partition("\t")
        if prompt:
            yield _prompt(
                f"{path}: line {number:,}", prompt, category.strip() or UNSORTED, str(number - 1), {}
            )


def _rows(
    path: Path, text: str, columns: Sequence[str], delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a table with a header, each with the number of its last line."""
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}: no column {missing[0]}; its header must have {', '.join(columns)}")
    try:
        for row in reader:
            short = [name for name in columns[:-1] if row[name] is None]
            if short:
                raise DataError(
                    f"{path}: line {reader.line_num:,}: no {short[0]}; the line has too few fields"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise DataError(f"{path}: after line {reader.line_num:,}: {error}; mend the table") from None


def _prompt(where: str, text: str, category: str, name: str, record: Mapping[str, Any]) -> Prompt:
    text = " ".join(text.split())
    if not text:
        raise DataError(f"{where}: the prompt is empty; leave the line out")
    if len(text) > LONGEST:
        raise DataError(f"{where}: a prompt of {len(text):,} characters; at most {LONGEST:,} are taken")
    odd = [letter for letter in text if unicodedata.category(letter) == "Cc"]
    if odd:
        raise DataError(f"{where}: the prompt holds the control character {odd[0]!r}; take it out")
    return Prompt(text, category.strip() or UNSORTED, name, record)
