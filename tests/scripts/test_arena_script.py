"""`scripts/arena.py`: from runs and folders to a page and back, one line a mistake, no vote lost on kill."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.arena.store import ArenaStore, Ballot, Entry, Showing
from evaluation.arena.votes import Outcome, Vote
from scripts.arena import main
from tests.servers import free_port
from tests.web.serving import Browser

PROJECT = Path(__file__).resolve().parents[2]
PROMPTS = "a sea\twater\na hill\tland\na desert\tland\n"


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Leaves this process's handler of SIGTERM as it was: `main` sets its own."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, two folders of pictures, and an arena of them."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "prompts.txt").write_text(PROMPTS)
    for name, shade in (("light", 200), ("dark", 30)):
        (folder / name).mkdir()
        for k in range(3):
            pixels = np.full((24, 20, 3), shade + k, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png", comment="made by nobody")
    code = main(
        [
            *("make", str(folder / "arena"), "--prompts", str(folder / "prompts.txt"), "--size", "16"),
            *("--folder", "light", str(folder / "light"), "--folder", "dark", str(folder / "dark")),
        ]
    )
    assert code == 0
    return folder


@pytest.fixture
def arena(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "arena", tmp_path / "arena"))


def vote(folder: Path, voter: str, outcome: Outcome) -> None:
    with ArenaStore.open(folder) as store:
        left, right = (next(p for p in store.pictures() if p.entrant == name) for name in ("light", "dark"))
        shown = Showing(voter, voter, 0, left.id, right.id, 1.0, 1.0)
        ballot = Ballot(shown, Vote("light", "dark", outcome, left.prompt, "water", voter, 0, 2.0, 1.0))
        assert store.commit([Entry(showing=shown), Entry(ballot=ballot)]) == [True, True]


def test_folders_become_an_arena_without_their_metadata(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ArenaStore.open(made / "arena") as store:
        assert [entrant.name for entrant in store.entrants()] == ["light", "dark"]
        assert [(p.text, p.category) for p in store.prompts()] == [
            ("a sea", "water"), ("a hill", "land"), ("a desert", "land"),
        ]  # fmt: skip
        pictures = store.pictures()
        assert len(pictures) == 6
        for picture in pictures:
            data = store.read_picture(picture.id)
            assert b"nobody" not in data
            assert picture.entrant.encode() not in data
    again = [*("make", str(made / "arena"), "--prompts", str(made / "prompts.txt"))]
    assert main([*again, "--folder", "light", str(made / "light")]) == 0
    assert "light: 0 pictures" in capsys.readouterr().out
    with ArenaStore.open(made / "arena") as store:
        assert store.pictures() == pictures


def test_checkpoints_become_entrants_and_their_settings_are_kept(
    made: Path, make_run: Callable[..., Path], tiny_config: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run = make_run(tmp_path / "run", tiny_config)
    command = ["make", str(tmp_path / "arena"), "--prompts", str(made / "prompts.txt"), "--each", "2"]
    entrants = [
        "--checkpoint",
        "two",
        str(run),
        "num_steps=2",
        "--checkpoint",
        "one",
        str(run),
        "num_steps=1",
    ]
    assert main([*command, *entrants]) == 0
    assert "two: 6 pictures" in capsys.readouterr().out
    assert main([*command, *entrants]) == 0
    assert "two: 0 pictures" in capsys.readouterr().out
    with ArenaStore.open(tmp_path / "arena") as store:
        assert (store.width, len(store.pictures())) == (16, 12)
        assert json.loads(store.entrants()[0].options)["num_steps"] == "2"
        assert len({store.read_picture(p.id) for p in store.pictures()}) == 12
    assert main([*command, "--checkpoint", "two", str(run), "num_steps=3"]) == 3
    assert "entrant two was" in capsys.readouterr().err
    for word, code, message in (
        ("steps=3", 2, "there is no option 'steps'"),
        ("num_steps=x", 2, "must be a number"),
        ("num_steps=0", 2, "must be from 1"),
        ("sampler=none", 2, "none"),
        ("heun", 2, "is no key=value"),
    ):
        assert main([*command, "--checkpoint", "x", str(run), word]) == code
        assert_one_line(capsys.readouterr().err, message)


def assert_one_line(text: str, message: str) -> None:
    assert len(text.strip().splitlines()) == 1, text
    assert text.startswith("arena.py: ")
    assert message in text


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("make {arena} --prompts {prompts}", 2, "there are no entrants"),
        ("make {arena} --prompts {prompts} --checkpoint a", 2, "give a name and a run"),
        ("make {arena} --prompts {prompts} --checkpoint a {none}", 4, "no such run"),
        ("make {arena} --prompts {prompts} --folder a {none}", 3, "there is no such folder"),
        ("make {arena} --prompts {prompts} --folder a {empty}", 3, "there is no picture in it"),
        (
            "make {arena} --prompts {prompts} --folder a {light} --folder a {light}",
            2,
            "two entrants are named a",
        ),
        ("make {arena} --prompts {prompts} --folder light {dark}", 3, "entrant light was"),
        ("make {arena} --prompts {none} --folder a {light}", 3, "cannot be read"),
        ("make {arena} --prompts {prompts} --each 0 --folder a {light}", 2, "--each is 0"),
        ("make {arena} --prompts {prompts} --size 32 --folder a {light}", 3, "are 16x16, not 32x32"),
        ("make {new} --prompts {prompts} --folder a {light}", 2, "--size is not set"),
        ("make {arena} --prompts {prompts} --folder a {odd}", 3, "cannot be told apart by prompt"),
        ("serve {none}", 3, "there is no arena here"),
        ("serve {one}", 3, "one entrant, light; a vote needs two"),
        ("serve {arena} --port 99999", 2, "--port is 99999"),
        ("serve {arena} --host 0.0.0.0 --port 0", 2, "--name"),
        ("serve {arena} --host 203.0.113.7 --port 0", 2, "cannot be listened on"),
        ("serve {arena} --port 0 --live", 2, "--live needs two checkpoints"),
        ("serve {damaged} --port 0", 3, "is damaged"),
        ("board {none}", 3, "there is no arena here"),
        ("export {arena} {none}/x/votes.jsonl", 5, "No such file"),
        ("rebuild {none}", 3, "there is no votes.jsonl"),
    ],
)
def test_a_mistake_is_one_line(
    made: Path,
    arena: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    code: int,
    message: str,
) -> None:
    for name in ("empty", "odd"):
        (tmp_path / name).mkdir()
    shutil.copy(made / "light" / "0.png", tmp_path / "odd" / "picture.png")
    damaged = Path(shutil.copytree(arena, tmp_path / "damaged"))
    (damaged / "arena.db").write_bytes(b"no database" * 1_000)
    if "{one}" in words:
        make = ["make", str(tmp_path / "one"), "--prompts", str(made / "prompts.txt"), "--size", "16"]
        assert main([*make, "--folder", "light", str(made / "light")]) == 0
        capsys.readouterr()
    places = {name: tmp_path / name for name in ("none", "empty", "odd", "new", "one", "damaged")}
    places |= {
        "arena": arena,
        "prompts": made / "prompts.txt",
        "light": made / "light",
        "dark": made / "dark",
    }
    assert main([word.format(**places) for word in words.split()]) == code
    assert_one_line(capsys.readouterr().err, message)


def test_a_port_that_is_taken_is_said(arena: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", str(arena), "--port", str(taken.getsockname()[1])]) == 2
    assert_one_line(capsys.readouterr().err, "give another --port")


FULL_DISK = """
import resource, sys
from scripts.arena import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    made: Path, arena: Path, tmp_path: Path, there: bool
) -> None:
    folder = arena if there else tmp_path / "new"
    words = [
        *("make", str(folder), "--prompts", str(made / "prompts.txt"), "--size", "16"),
        *("--folder", "light", str(made / "light"), "--folder", "dim", str(made / "dark")),
    ]
    command = [sys.executable, "-c", FULL_DISK, *words]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 5, done.stderr
    assert_one_line(done.stderr, "free some space and run the same command again")
    assert not list(folder.glob("*.part*"))
    assert main(words) == 0


def test_a_held_database_is_not_called_damaged(
    arena: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.arena.database.PATIENCE", 0.2)
    with closing(sqlite3.connect(arena / "arena.db", isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        assert main(["board", str(arena)]) == 5
    assert_one_line(capsys.readouterr().err, "another process holds it")


def test_folders_are_matched_by_manifest_record_name_or_order(made: Path, tmp_path: Path) -> None:
    prompts = ["make", str(tmp_path / "arena"), "--prompts", str(made / "prompts.txt"), "--size", "16"]

    def folder(name: str, files: dict[str, int]) -> Path:
        place = tmp_path / name
        place.mkdir()
        for file, shade in files.items():
            Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(place / file)
        return place

    manifest = folder("manifest", {"x.png": 3, "y.png": 1})
    lines = [{"file": "x.png", "prompt": "a desert"}, {"file": "y.png", "prompt": "a sea"}]
    (manifest / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = folder("records", {"00000.png": 2, "00001.png": 1, "contact_sheet.png": 9})
    for name, prompt in (("00000", "a hill"), ("00001", "a sea")):
        (records / f"{name}.json").write_text(json.dumps({"prompt": prompt}))
    names = folder("names", {"2.png": 3, "0.png": 1, "notes.png": 9})
    order = folder("order", {"a.png": 1, "b.png": 2, "c.png": 3})
    for place in (manifest, records, names, order):
        assert main([*prompts, "--folder", place.name, str(place)]) == 0
    with ArenaStore.open(tmp_path / "arena") as store:
        texts = {prompt.id: k + 1 for k, prompt in enumerate(store.prompts())}
        found: dict[str, set[int]] = {}
        for picture in store.pictures():
            with Image.open(tmp_path / "arena" / "pictures" / f"{picture.id}.png") as image:
                assert image.getpixel((0, 0)) == (texts[picture.prompt],) * 3
            found.setdefault(picture.entrant, set()).add(texts[picture.prompt])
    assert found == {"manifest": {1, 3}, "records": {1, 2}, "names": {1, 3}, "order": {1, 2, 3}}
    (manifest / "manifest.jsonl").write_text('{"file": "../records/00000.png", "prompt": "a sea"}\n')
    assert main([*prompts, "--folder", "again", str(manifest)]) == 3


def test_board_and_export_and_rebuild(
    arena: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k in range(6):
        vote(arena, f"v{k}", Outcome.LEFT if k else Outcome.RIGHT)
    assert main(["board", str(arena)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 votes by 6 voters; ratings with 95 % intervals"
    assert re.match(r" +1-2  light +1[01]\d\d  .* to .* +6  preliminary$", lines[2])
    assert main(["board", str(arena), "--json"]) == 0
    board = json.loads(capsys.readouterr().out)
    assert board["votes"] == 6
    assert main(["export", str(arena), str(tmp_path / "votes.jsonl")]) == 0
    with ArenaStore.open(arena) as store:
        votes = store.votes()
    written = [
        Vote.from_dict(json.loads(line)) for line in (tmp_path / "votes.jsonl").read_text().splitlines()
    ]
    assert written == votes
    (arena / "arena.db").write_bytes(b"gone" * 2_000)
    assert main(["rebuild", str(arena)]) == 0
    assert main(["board", str(arena), "--json"]) == 0
    assert "6 votes" in capsys.readouterr().out
    with ArenaStore.open(arena) as store:
        assert store.votes() == votes


@contextmanager
def served(folder: Path, port: int) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """The script serving `folder`, and its token."""
    command = [sys.executable, "scripts/arena.py", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(re.escape(f"http://127.0.0.1:{port}/?token=") + r"(\S+)\n", line)
            assert found, (line, process.stderr.read() if process.stderr else "")
            yield process, found[1]
        finally:
            process.kill()


class Voters(threading.Thread):
    """One voter after another, until the server is gone; the tokens that were acknowledged."""

    def __init__(self, port: int, token: str) -> None:
        super().__init__()
        self.port = port
        self.token = token
        self.told: list[str] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        try:
            while True:
                browser = Browser(self.port)
                if browser.enter(self.token).status == 429:
                    time.sleep(0.05)  # so many newcomers from one address have to wait
                    continue
                pair = browser.get("/api/arena/next").json()["pair"]
                while pair is not None:
                    answer = browser.post("/api/arena/vote", {"token": pair["token"], "outcome": "left"})
                    if answer.status != 200:
                        self.wrong.append(f"{answer.status} {answer.body!r}")
                        return
                    self.told.append(pair["token"].partition(".")[0])
                    pair = answer.json()["pair"]
        except (OSError, http.client.HTTPException, ValueError):
            return  # the server was killed


def kill_while_voting(folder: Path, rounds: int) -> None:
    told: list[str] = []
    for number in range(rounds):
        port = free_port()
        with served(folder, port) as (process, token):
            voters = [Voters(port, token) for _ in range(6)]
            for voter in voters:
                voter.start()
            time.sleep(0.7 + 0.13 * number)
            process.send_signal(signal.SIGKILL)
            for voter in voters:
                voter.join()
                assert voter.wrong == []
                told += voter.told
    with ArenaStore.open(folder) as store:
        kept = [row["token"] for row in store.rows()]
    print(f"{rounds} kills, {len(told)} votes acknowledged, {len(kept)} kept")
    assert len(told) >= 20 * rounds
    assert set(told) <= set(kept)
    assert len(kept) == len(set(kept)) <= len(told) + 6 * rounds  # kept, but killed before it could be said


def test_kill_during_voting_loses_nothing(arena: Path) -> None:
    kill_while_voting(arena, 1)


@pytest.mark.slow
def test_twelve_kills_during_voting_lose_nothing(arena: Path) -> None:
    kill_while_voting(arena, 12)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_cleanly(arena: Path, number: int, code: int) -> None:
    port = free_port()
    with served(arena, port) as (process, token):
        browser = Browser(port)
        browser.enter(token)
        pair = browser.get("/api/arena/next").json()["pair"]
        assert browser.post("/api/arena/vote", {"token": pair["token"], "outcome": "tie"}).status == 200
        process.send_signal(number)
        assert process.wait(60) == code
        assert process.stderr is not None
        assert_one_line(process.stderr.read(), "no vote and no picture is lost")
    with ArenaStore.open(arena) as store:
        assert len(store.votes()) == 1
