"""Filling an arena: prompts of a file, pictures of checkpoints, and folders of pictures made elsewhere.

A folder's pictures are matched to prompts in the first of these ways that its files offer:

    manifest.jsonl            a line a picture: {"file": "x.png", "prompt": "a sea at dawn"}
    x.json beside x.png       a record with its "prompt", as `sample.py` writes them
    ID.png, ID_1.png          names that are the prompts' ids in their file (lines count from 0)
    order                     exactly as many pictures as prompts times `each`, sorted by name
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.pictures import fit, read_picture
from data.progress import Progress
from data.shard_index import DataError
from evaluation.arena.blind import blind_png
from evaluation.arena.store import ArenaStore, Entrant, PromptRow
from evaluation.prompts import UNSORTED, Prompt
from models.pipeline import Pipeline
from models.registry import ConfigError, build, did_you_mean
from models.sampling import Job, Sampling

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
#: What a checkpoint entrant may be given, as key=value.
NUMBERS = {"num_steps": int, "guidance_scale": float}
PARTS = ("sampler", "grid", "guidance")
BATCH = 32


@dataclass(frozen=True)
class Scenes:
    """The prompts of an arena, `each` pictures of which every entrant has, and the seed of their noise."""

    prompts: Sequence[Prompt]
    each: int
    seed: int

    def rows(self) -> list[PromptRow]:
        """Returns the prompts as the store keeps them, in order."""
        return [_row(prompt) for prompt in self.prompts]


def _row(prompt: Prompt) -> PromptRow:
    category = "" if prompt.category == UNSORTED else prompt.category
    name = hashlib.sha256(f"{prompt.text}\n{category}".encode()).hexdigest()[:12]
    return PromptRow(name, prompt.text, category)


def choose_sampling(defaults: Sampling, options: Mapping[str, str]) -> Sampling:
    """Returns how a checkpoint's pictures are made: its own way, but for `options` such as num_steps=12.

    Raises ConfigError for an unknown option or a value that cannot be used.
    """
    given: dict[str, Any] = {}
    for key, text in options.items():
        if key in PARTS:
            given[key] = build(key, {"name": text})
        elif key in NUMBERS:
            try:
                given[key] = NUMBERS[key](text)
            except ValueError:
                raise ConfigError(f"{key} is '{text}', but must be a number") from None
        else:
            raise ConfigError(f"there is no option '{key}'{did_you_mean(key, [*NUMBERS, *PARTS])}")
    return replace(defaults, **given)


def add_checkpoint(
    store: ArenaStore, entrant: Entrant, pipeline: Pipeline, sampling: Sampling, scenes: Scenes
) -> int:
    """Makes what `entrant` lacks and returns how many pictures that were; raises as `Pipeline.generate`.

    All entrants begin from the same noise. An interrupted command goes on where it was.
    """
    store.add([entrant], scenes.rows())
    there = {(p.prompt, p.number) for p in store.pictures() if p.entrant == entrant.name}
    todo = [
        (row, number, index * scenes.each + number)
        for index, row in enumerate(scenes.rows())
        for number in range(scenes.each)
        if (row.id, number) not in there
    ]
    sampling = replace(sampling, seed=scenes.seed)
    size = (store.width, store.height)
    with Progress(f"sampling {entrant.name}", len(todo)) as progress:
        for first in range(0, len(todo), BATCH):
            some = todo[first : first + BATCH]
            jobs = [Job(row.text, index) for row, _, index in some]
            images = pipeline.generate(jobs, sampling, size, BATCH)
            for (row, number, _), pixels in zip(some, images, strict=True):
                store.add_picture(entrant.name, row.id, number, blind_png(pixels))
            progress.update(first + len(some))
    return len(todo)


def add_folder(store: ArenaStore, entrant: Entrant, folder: Path, scenes: Scenes) -> int:
    """Adds the pictures in `folder`, cut and resized to the store's size; returns how many are new.

    Raises DataError where none can be matched, or one cannot be read.
    """
    found = match_folder(folder, scenes)
    store.add([entrant], scenes.rows())
    there = {(p.prompt, p.number) for p in store.pictures() if p.entrant == entrant.name}
    added = 0
    for prompt, paths in zip(scenes.prompts, found, strict=True):
        row = _row(prompt)
        for number, path in enumerate(paths[: scenes.each]):
            if (row.id, number) not in there:
                pixels = fit(read_picture(path, entrant.name), store.width, store.height)
                store.add_picture(entrant.name, row.id, number, blind_png(pixels))
                added += 1
    return added


def match_folder(folder: Path, scenes: Scenes) -> list[list[Path]]:
    """Returns the pictures of each prompt in order; raises DataError where none can be matched."""
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of pictures")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    files = [path for path in files if path.stem != "contact_sheet"]
    if not files:
        raise DataError(f"{folder}: there is no picture in it; PNG, JPEG and WebP are read")
    texts = {prompt.text: k for k, prompt in enumerate(scenes.prompts)}
    ids = {prompt.id: k for k, prompt in enumerate(scenes.prompts)}
    matched: dict[int, list[Path]] = defaultdict(list)
    for path, said in _said(folder, files):
        k = texts.get(" ".join(said.split()), ids.get(said))
        if k is not None:
            matched[k].append(path)
    if not matched:
        for path in files:
            name = re.fullmatch(r"(.+?)(?:_(\d+))?", path.stem)
            if path.stem in ids:
                matched[ids[path.stem]].append(path)
            elif name is not None and name[1] in ids:
                matched[ids[name[1]]].append(path)
    if not matched and len(files) == len(scenes.prompts) * scenes.each:
        for k, path in enumerate(files):
            matched[k // scenes.each].append(path)
    if not matched:
        raise DataError(
            f"{folder}: its {len(files):,} pictures cannot be told apart by prompt; give manifest.jsonl with "
            '{"file": ..., "prompt": ...} a line, or as many pictures as prompts, in their order'
        )
    return [matched.get(k, []) for k in range(len(scenes.prompts))]


def _said(folder: Path, files: Sequence[Path]) -> list[tuple[Path, str]]:
    """What the manifest, or else the records beside the pictures, say of the prompts."""
    manifest = folder / "manifest.jsonl"
    known = {path.name: path for path in files}
    if manifest.is_file():
        said = []
        for number, line in enumerate(manifest.read_text(encoding="utf-8").splitlines(), start=1):
            record = _object(line)
            name, prompt = record.get("file"), record.get("prompt")
            if name not in known or not isinstance(prompt, str):
                raise DataError(
                    f"{manifest}: line {number} names no picture of this folder and its prompt; write "
                    '{"file": "x.png", "prompt": "a sea at dawn"}'
                )
            said.append((known[name], prompt))
        return said
    records = [(path, path.with_suffix(".json")) for path in files]
    texts = [
        (path, _object(r.read_text(encoding="utf-8")).get("prompt")) for path, r in records if r.is_file()
    ]
    return [(path, text) for path, text in texts if isinstance(text, str)]


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
