"""Makes the average of another width after training: `python scripts/ema.py RUN sigma_rel=0.13`.

The run was trained with `ema=power`, which leaves snapshots of two averages. Of them the average of any width
is put together (Karras et al. 2024, arXiv:2312.02696) and written as one file, as scripts/export.py does:
`sample.py checkpoint=OUT` makes pictures from it. `images=N` takes the average at an earlier time.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.checkpoint import CheckpointError
from models.loading import export
from models.stages.snapshots import reconstruct

USAGE, CHECKPOINT, ENVIRONMENT, INTERRUPTED = 2, 4, 5, 130


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="ema.py", description=description, epilog=notes)
    add = options.add_argument
    add("run", type=Path, help="folder of a run trained with ema=power")
    add("words", nargs="+", metavar="sigma_rel=0.13", help="the width, and images=N for an earlier time")
    add("--out", type=Path, help="the file to write (RUN/model-sigma_rel-0.13.safetensors)")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 wrong option, 4 checkpoint, 5 file system, 130 interrupted."""
    options = parser()
    args = options.parse_args(argv)
    words = dict(word.partition("=")[::2] for word in args.words)
    try:
        sigma_rel = float(words.pop("sigma_rel"))
        images = int(words.pop("images")) if "images" in words else None
    except (KeyError, ValueError):
        options.error("give a width as sigma_rel=0.13, and images as a whole number")
    if words:
        options.error(f"unknown: {', '.join(words)}; there are sigma_rel= and images=")
    out = args.out if args.out is not None else args.run / f"model-sigma_rel-{sigma_rel:g}.safetensors"
    try:
        export(args.run, out, reconstruct(args.run / "diffusion" / "averages", sigma_rel, images))
    except (ValueError, CheckpointError) as error:
        print(f"ema.py: {error}", file=sys.stderr)
        return USAGE if isinstance(error, ValueError) else CHECKPOINT
    except OSError as error:
        print(f"ema.py: {error}; check that the folder exists and can be written", file=sys.stderr)
        return ENVIRONMENT
    except KeyboardInterrupt:
        print("ema.py: interrupted; nothing that was there is changed", file=sys.stderr)
        return INTERRUPTED
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, the average of width {sigma_rel:g}")
    print(f'next: python sample.py checkpoint={out} prompt="..."')
    return 0


if __name__ == "__main__":
    sys.exit(main())
