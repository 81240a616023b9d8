"""The strict tar reader: it reads what tar writers write, and finds every cut and every header flip."""

import io
import tarfile
from collections.abc import Callable

import google_crc32c
import pytest

from data.tar import BLOCK, TarError, scan


def archive(members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes) -> list[tuple[str, bytes]]:
    return [(m.name, data[m.offset : m.offset + m.size]) for m in scan(io.BytesIO(data))]


MEMBERS = [("a.jpg", b"x" * 700), ("a.txt", b"caption"), ("b.jpg", b""), ("b.txt", b"y" * 512)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_every_format_with_long_names_and_checksums(form: int) -> None:
    members = [*MEMBERS, ("folder/" * 10 + "ü" * 20 + ".jpg", b"long")]
    if form != tarfile.USTAR_FORMAT:
        members.append(("z" * 300 + ".txt", b"longer"))
    data = archive(members, form)
    assert read(data) == members
    assert [m.crc32c for m in scan(io.BytesIO(data))] == [google_crc32c.value(body) for _, body in members]


def test_every_cut_is_found() -> None:
    data = archive(MEMBERS)
    end = next(m.offset + m.size for m in list(scan(io.BytesIO(data)))[-1:])
    marked = end + -end % BLOCK + 2 * BLOCK  # from here on only zeros that carry nothing are lost
    for cut in [*range(0, marked, BLOCK), *range(0, marked, 97), marked - 1]:
        with pytest.raises(TarError, match=r"cut off at byte \d+"):
            read(data[:cut])
    for cut in range(marked, len(data) + 1, BLOCK):
        assert read(data[:cut]) == MEMBERS


def test_every_header_flip_is_found_or_changes_nothing() -> None:
    data = archive(MEMBERS[:2])
    silent = 0
    for bit in range(BLOCK * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert read(bytes(damaged)) == MEMBERS[:2]
            silent += 1
        except TarError:
            pass
    assert silent <= 16  # blanks and NULs around the checksum's own digits


@pytest.mark.parametrize("place", [BLOCK + 700, -1, -BLOCK])
def test_flips_in_padding_and_end_are_found(place: int) -> None:
    damaged = bytearray(archive(MEMBERS))
    damaged[place] ^= 4
    with pytest.raises(TarError, match=r"not zero|after the end mark"):
        read(bytes(damaged))


def test_a_damaged_end_mark_is_found() -> None:
    data = archive(MEMBERS)
    end = list(scan(io.BytesIO(data)))[-1]
    mark = end.offset + 512
    for block in (0, 1):
        damaged = bytearray(data)
        damaged[mark + block * BLOCK + 99] = 1
        with pytest.raises(TarError, match="damaged"):
            read(bytes(damaged))


def special(change: Callable[[tarfile.TarInfo], None]) -> bytes:
    info = tarfile.TarInfo("a.jpg")
    info.linkname = "/etc/passwd"
    change(info)
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(tarfile.SYMTYPE, "symbolic link"), (tarfile.LNKTYPE, "hard link"), (tarfile.CHRTYPE, "device"),
     (tarfile.FIFOTYPE, "pipe"), (tarfile.GNUTYPE_SPARSE, "sparse file"), (b"Q", "type b'Q'")],
)  # fmt: skip
def test_links_devices_and_sparse_files_are_refused(kind: bytes, name: str) -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type = kind

    with pytest.raises(TarError, match=f"at byte 0 is a .*{name}"):
        read(special(change))


def test_directories_are_passed_over() -> None:
    def change(info: tarfile.TarInfo) -> None:
        info.type, info.name = tarfile.DIRTYPE, "folder/"

    assert read(special(change)) == []


def pax(record: bytes, kind: bytes = b"x") -> bytes:
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(record)
    body = record + bytes(-len(record) % BLOCK)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + archive([("a.jpg", b"data")])


@pytest.mark.parametrize(
    ("record", "message"),
    [(b"22 GNU.sparse.major=1\n", "sparse"), (b"99 path=a\n", "PAX header .* damaged"), (b"x", "damaged"),
     (b"10 size=x\n", "damaged"), (b"1" * 70000, "at most 65536"), (b"9 path=\xff\n", "no UTF-8")],
)  # fmt: skip
def test_bad_extension_headers_are_refused(record: bytes, message: str) -> None:
    with pytest.raises(TarError, match=message):
        read(pax(record))


def test_a_global_header_may_comment_but_not_rename() -> None:
    assert read(pax(b"13 comment=x\n", b"g")) == [("a.jpg", b"data")]
    with pytest.raises(TarError, match="sets path for all"):
        read(pax(b"10 path=b\n", b"g"))


def test_an_extension_header_needs_a_member() -> None:
    info = tarfile.TarInfo("header")
    info.type, info.size = b"x", 10
    data = info.tobuf(tarfile.USTAR_FORMAT) + b"10 path=a\n" + bytes(502) + bytes(1024)
    with pytest.raises(TarError, match="belongs to no member"):
        read(data)
