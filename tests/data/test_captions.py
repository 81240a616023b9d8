"""Tables and sidecar files are read, what is left out is said, and keys depend on paths alone."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.captions import Columns, find_table, read_pictures, read_table
from data.index import DataError


def write(path: Path, text: str | bytes = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"file_name": "a.jpg", "text": "a, b"}, {"file_name": "b.jpg", "text": "é"}]
    tables = [
        write(
            tmp_path / "t.jsonl",
            '{"file_name": "a.jpg", "text": "a, b"}\n\n{"file_name": "b.jpg", "text": "é"}\n',
        ),
        write(tmp_path / "t.csv", '\ufefffile_name,text\r\na.jpg,"a, b"\r\nb.jpg,é\r\n'),
        write(tmp_path / "t.tsv", "file_name\ttext\na.jpg\ta, b\nb.jpg\té\n"),
        tmp_path / "t.parquet",
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tables[-1])
    for table in tables:
        assert read_table(table) == rows


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", b'{"a": 1}\n{"a"\n', "t.jsonl line 2: bad JSON"),
        ("t.jsonl", b"[1]\n", "line 1: no JSON object"),
        ("t.csv", b"a,b\n1\n", "t.csv line 2: more or fewer cells"),
        ("t.csv", b"a,b\n1,2,3\n", "line 2: more or fewer"),
        ("t.csv", b"a\n\xff\n", "no UTF-8 at byte"),
        ("t.parquet", b"PAR1", "t.parquet: cannot be read"),
        ("t.xlsx", b"", "tables are .jsonl, .csv"),
    ],
)
def test_unreadable_tables_are_named_with_their_line(
    tmp_path: Path, name: str, text: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path / name, text))
    assert "\n" not in str(caught.value)


def test_a_row_becomes_a_picture_with_its_other_columns(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a b.v1.jpg")
    row = '{"file_name": "x/a b.v1.jpg", "text": " hi ", "split": "validation", "licence": "CC"}'
    [picture], skipped = read_pictures(tmp_path, write(tmp_path / "t.jsonl", row), Columns())
    assert (picture.key, picture.caption, picture.split) == ("x-a_b_v1", "hi", "val")
    assert picture.record == {"file_name": "x/a b.v1.jpg", "licence": "CC"}
    assert picture.path == tmp_path / "x" / "a b.v1.jpg"
    assert skipped == []


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d"):
        write(tmp_path / "s" / f"{name}.jpg")
    write(tmp_path / "secret.jpg")
    lines = [
        '{"file_name": "a.jpg", "text": "a"}',
        '{"file_name": "./a.jpg", "text": "again"}',
        '{"file_name": "b.jpg", "text": "b", "dup_of": "a.jpg"}',
        '{"file_name": "c.jpg", "text": " "}',
        '{"file_name": "none.jpg", "text": "x"}',
        '{"file_name": "../secret.jpg", "text": "x"}',
        '{"file_name": "", "text": "x"}',
        '{"file_name": "d.jpg", "text": "d", "dup_of": null}',
    ]
    table = write(tmp_path / "s" / "t.jsonl", "\n".join(lines))
    pictures, skipped = read_pictures(tmp_path / "s", table, Columns())
    assert [p.name for p in pictures] == ["a.jpg", "d.jpg"]
    assert [(s.name, s.reason.split(";")[0]) for s in skipped] == [
        ("./a.jpg", "the same file was named before"),
        ("b.jpg", "duplicate of a.jpg"),
        ("c.jpg", "no caption"),
        ("none.jpg", "no such file"),
        ("../secret.jpg", "the path leads out of the source folder"),
        ("", "the path leads out of the source folder"),
    ]
    kept, _ = read_pictures(tmp_path / "s", table, Columns(), keep_duplicates=True, keep_uncaptioned=True)
    assert [p.name for p in kept] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


def test_sidecar_captions(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpg", "a/3.webp", "a/.hidden/4.jpg", "a/notes.pdf"):
        write(tmp_path / name)
    write(tmp_path / "a" / "1.txt", "\ufeffone\n")
    write(tmp_path / "b" / "2.txt", "two")
    pictures, skipped = read_pictures(tmp_path, None, Columns())
    assert [(p.key, p.caption, p.split) for p in pictures] == [("a-1", "one", ""), ("b-2", "two", "")]
    assert [s.name for s in skipped] == ["a/3.webp"]


def test_folders_train_and_val_are_a_split(tmp_path: Path) -> None:
    for name in ("train/1", "val/2", "3"):
        write(tmp_path / f"{name}.jpg")
        write(tmp_path / f"{name}.txt")
    pictures, _ = read_pictures(tmp_path, None, Columns())
    split = [(p.name, p.split) for p in pictures]
    assert split == [("3.jpg", "train"), ("train/1.jpg", "train"), ("val/2.jpg", "val")]


def test_equal_keys_are_told_apart_by_a_hash_of_the_path(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png", "b.jpg"):
        write(tmp_path / name)
        write((tmp_path / name).with_suffix(".txt"))
    keys = [p.key for p in read_pictures(tmp_path, None, Columns())[0]]
    assert len(set(keys)) == 3
    assert keys[2] == "b"
    assert all(key.startswith("a-") and "." not in key for key in keys[:2])


def test_an_absent_column_is_met_with_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    table = write(tmp_path / "metadata.csv", "filename,caption\na.jpg,hello\n")
    with pytest.raises(DataError, match=r"no column 'file_name'; did you mean --image-column filename\?"):
        read_pictures(tmp_path, table, Columns())
    with pytest.raises(DataError, match=r"no column 'text'; did you mean --caption-column caption\?"):
        read_pictures(tmp_path, table, Columns(image="filename"))
    with pytest.raises(DataError, match=r"name one with --caption-column \(columns: filename, caption\)"):
        read_pictures(tmp_path, table, Columns(image="filename", caption="zzz"))
    [picture], _ = read_pictures(tmp_path, table, Columns(image="filename", caption="caption"))
    assert picture.caption == "hello"


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    table = write(tmp_path / "t.csv", "file_name,text,split\na.jpg,a,holdout\n")
    with pytest.raises(DataError, match=r"a\.jpg: its split is 'holdout'; write train, val or test"):
        read_pictures(tmp_path, table, Columns())


def test_nothing_to_pack_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_pictures(tmp_path / "absent", None, Columns())
    with pytest.raises(DataError, match="no pictures"):
        read_pictures(tmp_path, None, Columns())
    write(tmp_path / "a.jpg")
    with pytest.raises(
        DataError, match=r"nothing to pack, 1 times: no caption; put NAME\.txt beside NAME\.jpg"
    ):
        read_pictures(tmp_path, None, Columns())


def test_the_table_is_found_or_asked_for(tmp_path: Path) -> None:
    assert find_table(tmp_path) is None
    one = write(tmp_path / "metadata.jsonl")
    assert find_table(tmp_path) == one
    write(tmp_path / "captions.csv")
    message = r"metadata\.jsonl and captions\.csv are both there; say which with --captions"
    with pytest.raises(DataError, match=message):
        find_table(tmp_path)
