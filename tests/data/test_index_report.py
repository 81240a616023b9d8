"""The page about a dataset: nothing of the data runs or breaks out, and every finding says what to do."""

import html.parser
import json
from pathlib import Path

import pytest

from data.catalogue import Catalogue
from data.findings import find_duplicates, survey
from data.index_report import FINE, LOOK, STOPS, advise, page, write_report
from data.shard_index import read_index
from data.writer import write_shard

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>"


@pytest.fixture
def part(tmp_path: Path, make_image) -> dict[str, object]:
    """Findings about a dataset that has a little of everything."""

    def samples():
        for i in range(40):
            fields = {
                "jpg": make_image(i % 38, (24, 200 if i % 2 else 16)),
                "json": b'{"<b>x</b>": %d, "k": "v"}' % i,
            }
            if i == 1:
                fields["json"] = b"{"
            if i != 2:
                fields["txt"] = EVIL.encode() if i < 20 else b"" if i == 30 else b"word " * i
            if i == 3:
                del fields["jpg"]
            if i == 4:
                fields["jpg"] = b"no image"
            yield f"k{i}", fields

    write_shard(tmp_path / "0.tar", samples())
    catalogue = Catalogue.of([read_index(tmp_path / "0.tar")], tmp_path)
    damaged = [{"shard": "1.tar", "problem": f"1.tar: {EVIL} cut off"}]
    return {
        "name": "train", "shards": 2, "kept": 0, "bytes": 1, "fingerprint": "f" * 64, "damaged": damaged,
        "left_out": False,
        "repeated_keys": {"count": 1, "more": False, "examples": [[EVIL, "a.tar", "b.tar"]]},
        "duplicates": find_duplicates(catalogue, None).findings, **survey(catalogue),
    }  # fmt: skip


def test_figures(part) -> None:
    assert (part["samples"], part["bad_json"], part["fields"]["jpg"]["missing"]) == (40, 1, 1)
    captions, images = part["captions"], part["images"]
    assert (captions["absent"], captions["empty"], captions["most_words"]) == (1, 1, 39)
    assert captions["frequent"][0] == {"shard": "0.tar", "key": "k0", "text": EVIL, "times": 19}
    assert captions["longest"]["key"] == "k39"
    assert captions["distinct"] == 1 + 19
    assert sum(count for _, count in captions["words"]) == 39
    assert (images["missing"], images["unknown_size"]) == (1, 1)
    assert images["height"] == {"samples": 38, "min": 16.0, "median": 108.0, "max": 200.0}
    assert sum(count for _, count in images["aspects"]) == 38
    assert part["numbers"]["<b>x</b>"] == {"samples": 39, "min": 0.0, "median": 20.0, "max": 39.0}
    assert part["strings"] == {"k": {"samples": 39, "distinct": 1}}
    assert part["duplicates"]["identical"]["groups"] == 2
    assert part["duplicates"]["extra"] == 2


def test_every_finding_says_what_to_do(part) -> None:
    found = advise(part)
    text = " ".join(f"{advice.finding} {advice.remedy}" for advice in found)
    assert [advice.weight for advice in found] == sorted(
        (a.weight for a in found), key=[STOPS, LOOK, FINE].index
    )
    for words in (
        "1 of 2 shards are damaged", "--leave-out-damaged", "1 keys occur in two shards", "JSON of 1 samples",
        "2 of 40 samples have no caption (1 absent, 1 empty)", "data.missing_caption=UNCONDITIONAL",
        "One caption occurs 19 times", "1 of 40 samples have no picture", "1 pictures cannot be opened",
        "data.unique=true", "--perceptual-hash", "'data.where=width > 0'",
    ):  # fmt: skip
        assert words in text
    assert all(advice.remedy for advice in found)


class Tags(html.parser.HTMLParser):
    """Collects the tags and attributes of a page, and that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.names: set[str] = set()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.names |= {name for name, _ in attrs}
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_nothing_of_the_data_breaks_out_of_the_page(part, tmp_path: Path) -> None:
    report = {"shards": EVIL, "out": "x", "parts": [part], "next": [f"python train.py {EVIL}"]}
    paths = write_report(tmp_path, report)
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report))
    text = paths[1].read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert not {"script", "img", "link", "iframe", "b"} & tags.seen
    assert not {"onerror", "src", "href", "onload", "style"} & tags.names
    assert "svg" in tags.seen
    assert "&lt;script&gt;alert(1)" in text
    assert "default-src 'none'" in text


def test_a_part_without_samples_has_a_page(part) -> None:
    empty = {key: part[key] for key in ("name", "shards", "bytes", "damaged", "left_out", "fingerprint")}
    report = {"shards": "x", "out": "x", "parts": [{**empty, "samples": 0}], "next": []}
    assert "shards are damaged" in page(report)
