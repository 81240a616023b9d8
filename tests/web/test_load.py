"""200 voters at once on loopback: each vote is answered when it is on the disk, and none is lost.

A server of its own process; voters with a cookie and a connection of their own, who look at both pictures of
a pair and vote. It ends by itself after `SECONDS`.
"""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.arena.ledger import read_ledger
from evaluation.arena.store import ArenaStore
from tests.servers import free_port

PROJECT = Path(__file__).resolve().parents[2]
VOTERS, SECONDS = 200, 60.0


@dataclass
class Tally:
    """What voters were told, and how long it took, in seconds."""

    tokens: list[str] = field(default_factory=list)
    votes: list[float] = field(default_factory=list)
    pictures: list[float] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


class Voter:
    """One voter on one connection that stays open."""

    def __init__(self, port: int, tally: Tally) -> None:
        self.port = port
        self.tally = tally
        self.cookie = ""

    async def vote_until(self, end: float, token: str, pause: float, rng: random.Random) -> None:
        """Votes again and again, `pause` seconds apart on average (0: at once), until the time `end`."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        status, headers, _ = await self.ask("GET", f"/?token={token}")
        while status == 429:
            await asyncio.sleep(1.0)
            status, headers, _ = await self.ask("GET", f"/?token={token}")
        self.cookie = headers["set-cookie"].split(";")[0]
        _, _, body = await self.ask("GET", "/api/arena/next")
        pair = json.loads(body)["pair"]
        while time.monotonic() < end and pair is not None:
            for side in ("left", "right"):
                began = time.monotonic()
                await self.ask("GET", pair[side])
                self.tally.pictures.append(time.monotonic() - began)
            if pause:
                await asyncio.sleep(rng.uniform(0, 2 * pause))
            values = {"token": pair["token"], "outcome": rng.choice(("left", "right", "tie", "both_bad"))}
            began = time.monotonic()
            status, _, body = await self.ask("POST", "/api/arena/vote", values)
            if status != 200:
                self.tally.refused.append(f"{status} {body!r}")
                break
            self.tally.votes.append(time.monotonic() - began)
            self.tally.tokens.append(pair["token"].partition(".")[0])
            pair = json.loads(body)["pair"]
        self.writer.close()

    async def ask(self, method: str, path: str, values: Any = None) -> tuple[int, dict[str, str], bytes]:
        """One request and its answer: status, headers, body."""
        body = b"" if values is None else json.dumps(values).encode()
        host = f"127.0.0.1:{self.port}"
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Cookie: {self.cookie}"]
        if method == "POST":
            lines += [
                f"Origin: http://{host}",
                "Content-Type: application/json",
                f"Content-Length: {len(body)}",
            ]
        self.writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:] if line)}
        return int(head[0].split()[1]), headers, await self.reader.readexactly(int(headers["content-length"]))


def load(folder: Path, voters: int, seconds: float, pause: float) -> dict[str, float]:
    """Lets people vote on `folder`, checks that nothing is lost, and returns what was measured."""
    port, tally = free_port(), Tally()
    command = [sys.executable, "scripts/arena.py", "serve", str(folder), "--port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            found = re.search(r"token=(\S+)", process.stdout.readline())
            assert found, process.stderr.read()
            token, end = found[1], time.monotonic() + seconds

            async def crowd() -> None:
                people = [Voter(port, tally) for _ in range(voters)]
                await asyncio.gather(
                    *(who.vote_until(end, token, pause, random.Random(k)) for k, who in enumerate(people))
                )

            asyncio.run(crowd())
            process.terminate()
            assert process.wait(60) == 143
            assert process.stderr.read().splitlines() == [
                "arena.py: stopped; no vote and no picture is lost, the same command goes on"
            ]
        finally:
            process.kill()
    assert tally.refused == []
    with ArenaStore.open(folder) as store:
        kept = [row["token"] for row in store.rows()]
    assert sorted(kept) == sorted(tally.tokens)
    assert [row["token"] for row in read_ledger(folder / "votes.jsonl")] == kept
    times = {"vote": np.array(tally.votes) * 1e3, "picture": np.array(tally.pictures) * 1e3}
    figures = {f"{k}_p{p}_ms": float(np.percentile(each, p)) for k, each in times.items() for p in (50, 99)}
    return {"votes": len(kept), "votes_per_second": len(kept) / seconds, **figures}


def test_a_few_voters_at_once_lose_nothing(arena: Path) -> None:
    figures = load(arena, voters=20, seconds=1.0, pause=0.0)
    assert figures["votes"] >= 40


@pytest.mark.slow
@pytest.mark.parametrize("pause", [0.0, 4.0])
def test_two_hundred_voters_for_a_minute_lose_nothing(
    pause: float, tmp_path: Path, fill: Callable[..., Path]
) -> None:
    folder = fill(tmp_path / "arena", 80, ("a", "b", "c", "d"))
    figures = load(folder, VOTERS, SECONDS, pause)
    print(
        f"{VOTERS} voters, a pause of {pause:g} s:", {key: round(value, 1) for key, value in figures.items()}
    )
    assert figures["votes"] >= 2_000
    if pause:
        assert figures["vote_p99_ms"] < 1_000
