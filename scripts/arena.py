"""A blind vote between your own checkpoints: makes an arena, serves its page, prints its leaderboard.

    python scripts/arena.py make arena --prompts prompts.txt \\
        --checkpoint small runs/a --checkpoint large runs/b num_steps=12 --folder photos pictures/
    python scripts/arena.py serve arena          # prints the address to open; Ctrl-C ends it, nothing is lost
    python scripts/arena.py board arena          # who leads, with intervals; --json for all of it
    python scripts/arena.py export arena votes.jsonl

`make` may be run again: what is there is kept, and what is new is added. How a folder's pictures are matched
to prompts: evaluation/arena/making.py. `serve --live` also lets voters type prompts of their own.
"""

import argparse
import errno
import json
import logging
import signal
import sys
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.arrays import write_atomic
from data.shard_index import DataError
from evaluation.arena.board import Row, leaderboard
from evaluation.arena.database import Unusable, remedy
from evaluation.arena.store import ArenaStore, Entrant, rebuild
from models.checkpoint import CheckpointError
from models.registry import ConfigError

if TYPE_CHECKING:
    from web.live import Live

USAGE, DATA, CHECKPOINT, ENVIRONMENT, NUMERICAL, INTERRUPTED, TERMINATED = 2, 3, 4, 5, 6, 130, 143
PORT = 8017
_FULL = "free some space and run the same command again: no vote and no picture is lost"


class Terminated(BaseException):
    """SIGTERM arrived."""


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("arena.py", None, description, notes, formatter_class=raw)
    verbs = options.add_subparsers(dest="verb", required=True, metavar="VERB")
    add = _verb(verbs, "make", "makes an arena, or adds to one").add_argument
    add("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line, JSONL, TSV or CSV")
    add("--count", type=int, metavar="N", help="so many of them, categories in turn (all)")
    add("--each", type=int, default=1, metavar="N", help="pictures of each prompt by each entrant (1)")
    add("--seed", type=int, default=0, help="of the noise that all checkpoints begin from (0)")
    add("--size", type=int, metavar="PIXELS", help="a side of all pictures (the first checkpoint's own)")
    add(
        "--checkpoint",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "RUN"),
        help="an entrant: name, run folder or exported file, and perhaps num_steps=12 guidance_scale=4 "
        "sampler=heun grid=karras guidance=refined; may be given several times",
    )
    add(
        "--folder",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "FOLDER"),
        help="an entrant whose pictures are made already; may be given several times",
    )
    add = _verb(verbs, "serve", "serves the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; only this machine can reach the default")
    add("--port", type=int, default=PORT, help=f"port to listen on; 0 takes a free one ({PORT})")
    add("--name", action="append", default=[], metavar="HOST:PORT", help="a further name it is opened by")
    add("--live", action="store_true", help="voters may type prompts, which the checkpoints then paint")
    add = _verb(verbs, "board", "prints the leaderboard").add_argument
    add("--json", action="store_true", help="all that is known, as one JSON object")
    add = _verb(verbs, "export", "writes the votes as JSON lines").add_argument
    add("out", type=Path, help="file to write")
    _verb(verbs, "rebuild", "makes a damaged database anew from votes.jsonl")
    return options


def _verb(
    verbs: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=text)
    verb.add_argument("arena", type=Path, help="folder of the arena")
    return verb


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 usage, 3 data, 4 checkpoint, 5 environment, 6 numerical, 130, 143."""
    options = parser()
    args = options.parse_args(argv)
    logging.basicConfig(format="arena.py: %(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # one line each is said by the guard
    signal.signal(signal.SIGTERM, _terminate)
    codes: list[tuple[type[BaseException], int]] = [
        *((ConfigError, USAGE), (DataError, DATA), (CheckpointError, CHECKPOINT), (OSError, ENVIRONMENT)),
        *((Unusable, ENVIRONMENT), (FloatingPointError, NUMERICAL)),
        *((KeyboardInterrupt, INTERRUPTED), (Terminated, TERMINATED)),
    ]
    verbs = {"make": make, "serve": serve, "board": board, "export": export, "rebuild": _rebuild}
    try:
        verbs[args.verb](args)
    except BaseException as error:
        code = next((code for kind, code in codes if isinstance(error, kind)), None)
        if code is None:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = _FULL if full else "check that the path exists and can be written"
            text = f"{error.filename or 'writing failed'}: {error.strerror}; {hint}"
        elif isinstance(error, Unusable):
            text = f"{args.arena}: {text}; {remedy(error) or f'the disk is full or fails: {_FULL}'}"
        if code in (INTERRUPTED, TERMINATED):
            text = "stopped; no vote and no picture is lost, the same command goes on"
        print(f"arena.py: {text}", file=sys.stderr)
        return code
    return 0


def make(args: argparse.Namespace) -> None:
    """Makes an arena or adds to one; raises ConfigError, DataError, CheckpointError, OSError."""
    import torch

    from evaluation.arena.making import Scenes, add_checkpoint, add_folder, choose_sampling
    from evaluation.prompts import read_prompts
    from models.loading import load_pipeline

    _check_make(args)
    suite = read_prompts(args.prompts)
    prompts = suite.prompts if args.count is None else suite.sampled(args.count)
    scenes = Scenes(prompts, args.each, args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = args.size
    for name, path, *words in args.checkpoint:
        pipeline, _, sha256 = load_pipeline(Path(path), device)
        options = dict(_option(word) for word in words)
        assert pipeline.defaults is not None
        sampling = choose_sampling(pipeline.defaults, options)
        size = size or pipeline.resolution
        pipeline.latent_size((size, size))
        about = json.dumps({"checkpoint_sha256": sha256, "seed": args.seed, **options}, sort_keys=True)
        with ArenaStore.create(args.arena, size, size) as store:
            made = add_checkpoint(store, Entrant(name, path, about), pipeline, sampling, scenes)
        print(f"{name}: {made:,} pictures by {path}")
    for name, folder in args.folder:
        if size is None:
            size = _size_of(args.arena)
        with ArenaStore.create(args.arena, size, size) as store:
            about = json.dumps({"folder": folder})
            made = add_folder(store, Entrant(name, "", about), Path(folder), scenes)
        print(f"{name}: {made:,} pictures of {folder}")
    with ArenaStore.open(args.arena) as store:
        if len(store.entrants()) < 2:
            print(f"one entrant so far; add another one to {args.arena} before it is served")
            return
    print(f"next: python scripts/arena.py serve {args.arena}")


def _check_make(args: argparse.Namespace) -> None:
    if not args.checkpoint and not args.folder:
        raise ConfigError("there are no entrants; give --checkpoint NAME RUN or --folder NAME FOLDER")
    for words in args.checkpoint:
        if len(words) < 2:
            raise ConfigError(f"--checkpoint {words[0]}: give a name and a run, as --checkpoint small runs/a")
    names = [words[0] for words in (*args.checkpoint, *args.folder)]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two entrants are named {name}; give each a name of its own")
        if not (name.isprintable() and 0 < len(name) <= 60):
            raise ConfigError(f"{name!r} is no name; give 1 to 60 printable characters")
    for key in ("count", "each", "size"):
        value = getattr(args, key)
        if value is not None and not 1 <= value <= 100_000:
            raise ConfigError(f"--{key} is {value}, but must be from 1 to 100,000")


def _option(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"'{word}' is no key=value; as in --checkpoint small runs/a num_steps=12")
    return key, value


def _size_of(folder: Path) -> int:
    """The size of an arena that is there; for the first entrant it must be given where none is sampled."""
    if not (folder / "arena.db").exists():
        raise ConfigError("--size is not set, and no checkpoint says it; give a side in pixels, such as 64")
    with ArenaStore.open(folder, writes=False) as store:
        return store.width


def serve(args: argparse.Namespace) -> None:
    """Serves an arena until a signal comes; raises ConfigError, DataError, CheckpointError, OSError."""
    from web.app import create_app
    from web.arena import arena_part
    from web.security import Access, is_loopback
    from web.server import Server, listen
    from web.voting import Voting

    if not 0 <= args.port <= 65_535:
        raise ConfigError(f"--port is {args.port}, but must be from 0 (a free one) to 65535")
    with ArenaStore.open(args.arena) as store:
        _check_servable(args.arena, store)
        try:
            listener = listen(args.host, args.port)
        except OSError as error:
            raise ConfigError(
                f"{args.host}:{args.port} cannot be listened on ({error.strerror}); "
                "end what listens there, or give another --port"
            ) from None
        with closing(listener):
            port = int(listener.getsockname()[1])
            try:
                access = Access.of(args.host, port, store.secret, args.name)
            except ValueError as error:
                raise ConfigError(str(error)) from None
            live = _live(store) if args.live else None
            app = create_app(access, arena_part(Voting(store, access.sign), live))
            opened = args.name[0] if args.name else f"{args.host}:{port}"
            if not is_loopback(args.host):
                print("others on the network can open this page; all who have its address can vote")
            print(f"http://{opened}/?token={access.token}", flush=True)
            try:
                Server(app, listener).run()
            finally:
                if live is not None:
                    live.close()


def _check_servable(folder: Path, store: ArenaStore) -> None:
    """Raises DataError where there is nothing to vote on."""
    entrants = {entrant.name for entrant in store.entrants()}
    if len(entrants) < 2:
        known = f"one entrant, {min(entrants)}" if entrants else "no entrants"
        raise DataError(f"{folder} has {known}; a vote needs two: scripts/arena.py make {folder} ...")
    if len({picture.entrant for picture in store.pictures()}) < 2:
        raise DataError(
            f"{folder} has pictures of fewer than two entrants: scripts/arena.py make {folder} ..."
        )


def _live(store: ArenaStore) -> "Live":
    """The checkpoints among the entrants, loaded; raises ConfigError where they are fewer than two."""
    import torch

    from evaluation.arena.making import choose_sampling
    from models.loading import load_pipeline
    from web.live import Live, Maker

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    makers = {}
    for entrant in store.entrants():
        if not entrant.checkpoint:
            continue
        pipeline, _, sha256 = load_pipeline(Path(entrant.checkpoint), device)
        options = json.loads(entrant.options)
        if options.pop("checkpoint_sha256") != sha256:
            raise CheckpointError(
                f"{entrant.checkpoint} has changed since {entrant.name} was made of it; serve without --live"
            )
        options.pop("seed")
        assert pipeline.defaults is not None
        makers[entrant.name] = Maker(pipeline, choose_sampling(pipeline.defaults, options))
    if len(makers) < 2:
        raise ConfigError("--live needs two checkpoints among the entrants; leave it out for folders")
    return Live(makers, (store.width, store.height))


def board(args: argparse.Namespace) -> None:
    """Prints the leaderboard; raises DataError."""
    with ArenaStore.open(args.arena, writes=False) as store:
        found = leaderboard(store.votes(), [entrant.name for entrant in store.entrants()])
    if args.json:
        print(json.dumps(found.to_dict()))
        return
    width = max((len(row.entrant) for row in found.rows), default=7)
    print(f"{found.votes:,} votes by {found.voters:,} voters; ratings with 95 % intervals")
    print(f"{'rank':>7}  {'entrant':<{width}}  {'rating':>6}  {'interval':>15}  {'votes':>6}")
    for row in found.rows:
        print(_line(row, width))


def _line(row: Row, width: int) -> str:
    rank = f"{row.rank}" if row.rank == row.worst_rank else f"{row.rank}-{row.worst_rank}"
    rating = "-" if row.rating is None else f"{row.rating:.0f}"
    ends = ["open" if end is None else f"{end:.0f}" for end in (row.interval.low, row.interval.high)]
    interval = "-" if row.rating is None else f"{ends[0]} to {ends[1]}"
    mark = "  preliminary" if row.preliminary else ""
    return f"{rank:>7}  {row.entrant:<{width}}  {rating:>6}  {interval:>15}  {row.tally.votes:>6,}{mark}"


def export(args: argparse.Namespace) -> None:
    """Writes the votes as JSON lines; raises DataError, OSError."""
    with ArenaStore.open(args.arena, writes=False) as store:
        votes = store.votes()
    lines = [json.dumps(vote.to_dict(), ensure_ascii=False) + "\n" for vote in votes]
    write_atomic(args.out, "".join(lines).encode())
    print(f"{args.out}: {len(votes):,} votes")


def _rebuild(args: argparse.Namespace) -> None:
    count = rebuild(args.arena)
    print(
        f"{args.arena}: {count:,} votes; now make the entrants again: scripts/arena.py make {args.arena} ..."
    )


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
