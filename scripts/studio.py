"""A page to make pictures with: type a prompt, watch it denoise, paint over, compare checkpoints.

    python scripts/studio.py                          # every run below runs/
    python scripts/studio.py runs/landscapes model.safetensors
    python scripts/studio.py large=runs/b early=runs/a/diffusion/checkpoints/images-000000008000

It prints the address to open. Ctrl-C ends it; finished pictures are in the folder `--pictures`, each with the
record that `python sample.py verify=PICTURE` prints. The newest 4 GiB of them are kept, or `--keep` GiB.
"""

import argparse
import logging
import secrets
import signal
import sys
import webbrowser
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checkpoint import CheckpointError
from models.registry import ConfigError

if TYPE_CHECKING:
    import torch

    from web.shelf import Place

USAGE, CHECKPOINT, ENVIRONMENT, INTERRUPTED, TERMINATED = 2, 4, 5, 130, 143
PORT = 8018


class Terminated(BaseException):
    """SIGTERM arrived."""


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    options = argparse.ArgumentParser("studio.py", None, description, notes, formatter_class=raw)
    add = options.add_argument
    add(
        "checkpoints",
        nargs="*",
        metavar="[NAME=]PATH",
        help="a run's folder, one of its checkpoints, an exported file, or a folder of such (runs)",
    )
    add(
        "--pictures",
        type=Path,
        default=Path("samples/studio"),
        help="folder of finished pictures (%(default)s)",
    )
    add(
        "--keep",
        type=float,
        default=4.0,
        metavar="GIB",
        help="of finished pictures; where there are more the oldest are removed, with inf none (%(default)s)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where networks run (%(default)s)")
    add("--host", default="127.0.0.1", help="address to listen on; only this machine can reach the default")
    add("--port", type=int, default=PORT, help="port to listen on; 0 takes a free one (%(default)s)")
    add("--name", action="append", default=[], metavar="HOST:PORT", help="a further name it is opened by")
    add("--open", action="store_true", help="opens the page in a browser")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 usage, 4 checkpoint, 5 environment, 130 interrupted, 143 terminated."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="studio.py: %(message)s", level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # one line each is said by the guard
    signal.signal(signal.SIGTERM, _terminate)
    codes: list[tuple[type[BaseException], int]] = [
        *((ConfigError, USAGE), (CheckpointError, CHECKPOINT), (OSError, ENVIRONMENT)),
        *((KeyboardInterrupt, INTERRUPTED), (Terminated, TERMINATED)),
    ]
    try:
        serve(args)
    except BaseException as error:
        code = next((code for kind, code in codes if isinstance(error, kind)), None)
        if code is None:
            raise
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.strerror:
            place = f"{error.filename}: " if error.filename else ""
            text = f"{place}{error.strerror}; check that it exists, is free, and can be written"
        if code in (INTERRUPTED, TERMINATED):
            text = f"stopped; the pictures are in {args.pictures}"
        print(f"studio.py: {text}", file=sys.stderr)
        return code
    return 0


def serve(args: argparse.Namespace) -> None:
    """Serves the page until a signal; raises ConfigError, CheckpointError, OSError."""
    from web.shelf import Place

    if not 0 <= args.port <= 65_535:
        raise ConfigError(f"--port is {args.port}, but must be from 0 to 65,535")
    if not args.keep > 0:
        raise ConfigError(f"--keep is {args.keep}, but must be above 0; inf keeps every picture")
    places = [Place.of(word) for word in args.checkpoints or ["runs"]]
    check(places)
    from web.album import Album
    from web.app import create_app
    from web.painter import Painter
    from web.security import Access, is_loopback
    from web.server import Server, listen
    from web.shelf import Shelf
    from web.studio import studio_part

    shelf = Shelf(places, choose_device(args.device))
    painter = Painter(shelf, Album(args.pictures, kept_bytes=args.keep * 2**30))
    listener = listen(args.host, args.port)
    port = int(listener.getsockname()[1])
    try:
        access = Access.of(args.host, port, secrets.token_bytes(32), args.name)
    except ValueError as error:
        listener.close()
        raise ConfigError(str(error)) from None
    if not is_loopback(args.host):
        print(
            "studio.py: this page can be reached from other machines, over a connection that is not "
            "encrypted; give the address only to people you trust, and better put a proxy with TLS before it",
            file=sys.stderr,
        )
    shown = args.name[0] if args.name else f"{'127.0.0.1' if is_loopback(args.host) else args.host}:{port}"
    address = f"http://{shown}/?token={access.token}"
    server = Server(create_app(access, [studio_part(painter)]), listener)
    painter.look()
    painter.start()
    try:
        print(f"open {address}", flush=True)
        if args.open:
            webbrowser.open(address)
        server.run()
    finally:
        painter.stop()


def check(places: list["Place"]) -> None:
    """Raises CheckpointError where a place is not there, or nothing is in all of them."""
    for place in places:
        if not place.path.exists():
            raise CheckpointError(
                f"{place.path}: there is no such file or folder; train a model first, as make demo does"
            )
    if not any(place.checkpoints() for place in places):
        named = ", ".join(str(place.path) for place in places)
        raise CheckpointError(f"{named}: there is no run with a checkpoint; train one, as make demo does")


def choose_device(name: str) -> "torch.device":
    """Returns the device; raises ConfigError where a GPU is asked for and there is none."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but this machine has no usable GPU; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


if __name__ == "__main__":
    sys.exit(main())
