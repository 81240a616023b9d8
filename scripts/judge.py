"""Trains the judge of landscapes that evaluations share: `python scripts/judge.py runs/judge`.

A judge that is there and can be used is kept. Training it takes about a minute of one core. `train.py` runs
this beside a training of rendered landscapes where a core has nothing else to do; by hand it is for a judge
before any such run.
"""

import argparse
import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.report import find_judge
from models.stages.launch import stay_with_parent

ENVIRONMENT, INTERRUPTED = 5, 130


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="judge.py", description=description, epilog=notes)
    options.add_argument("folder", type=Path, help="where it is kept, beside the runs, such as runs/judge")
    options.add_argument("--nice", type=int, default=0, help="how far it stands behind other work, 0 to 19")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 wrong option, 5 file system, 130 interrupted."""
    options = parser()
    args = options.parse_args(argv)
    if not 0 <= args.nice <= 19:
        options.error(f"--nice is {args.nice}, but must be 0 to 19")
    stay_with_parent()
    os.nice(args.nice)
    try:
        judge = find_judge(args.folder)
    except OSError as error:
        print(f"judge.py: {error}; check that the folder can be written", file=sys.stderr)
        return ENVIRONMENT
    except KeyboardInterrupt:
        return INTERRUPTED
    shares = ", ".join(f"{name} {share:.1%}" for name, share in judge.card.accuracies.items())
    print(f"{args.folder}: right on held-out landscapes: {shares}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
