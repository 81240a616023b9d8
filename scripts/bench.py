"""Measures how fast the project is next to what it could be: `python scripts/bench.py loader`, for one.

Each benchmark has arms that take turns, forwards and backwards, on one machine in one run; told are ratios
with their intervals, and beside them the ratio of an arm to itself, which is what the method errs by. Figures
are printed as a table; the last line is one JSON object with all of them.
"""

import argparse
import inspect
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.shard_index import DataError, write_atomic
from evaluation.adherence import JudgeError
from models.checkpoint import CheckpointError
from models.registry import ConfigError
from scripts.benches.findings import Findings
from scripts.benches.learning import learning
from scripts.benches.loader import loader
from scripts.benches.overhead import overhead
from scripts.benches.quality import quality
from scripts.benches.quality_train import TrainingError
from scripts.benches.sampling import sampling
from scripts.benches.step import step
from scripts.benches.step_arms import NotEqualError
from scripts.benches.step_peak import PeakError

#: A benchmark is a function here: its arguments, all with defaults, are its options, described under Args.
BENCHMARKS: dict[str, Callable[..., Findings]] = {
    "learning": learning,
    "loader": loader,
    "overhead": overhead,
    "quality": quality,
    "sampling": sampling,
    "step": step,
}
USAGE, DATA, CHECKPOINT, ENVIRONMENT, NUMERICAL, INTERRUPTED = 2, 3, 4, 5, 6, 130


def parser() -> argparse.ArgumentParser:
    """Returns the command's options, those of each benchmark from its function's signature."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="bench.py", description=description, epilog=notes)
    choices = options.add_subparsers(dest="bench", required=True, metavar="BENCHMARK")
    for name, function in BENCHMARKS.items():
        text = inspect.getdoc(function) or ""
        first = text.partition("\n")[0].removeprefix("Returns ")
        command = choices.add_parser(name, help=first, description=first)
        for argument in inspect.signature(function).parameters.values():
            about = re.search(rf"^    {argument.name}: (.*)$", text, re.MULTILINE)
            reads: dict[str, Any] = {"type": _type(argument.annotation)}
            if argument.annotation is bool:
                reads = {"action": argparse.BooleanOptionalAction}
            command.add_argument(
                f"--{argument.name.replace('_', '-')}",
                default=argument.default,
                help=f"{about[1] if about else ''} (%(default)s)",
                **reads,
            )
        command.add_argument("--out", type=Path, metavar="FOLDER", help=f"where {name}.json is written too")
    return options


def _type(annotation: object) -> Callable[[str], object]:
    """Returns what reads an option of a type such as int or `Path | None`."""
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    kind = next(each for each in kinds if each is not type(None))
    assert isinstance(kind, type)
    return kind


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all was measured.

    2 is a wrong option, 3 shards or 4 a checkpoint that cannot be read, 5 a process that could not measure
    (no memory, mostly), 6 arms that do not compute the same.
    """
    options = parser()
    given = vars(options.parse_args(argv))
    name, out = given.pop("bench"), given.pop("out")
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)  # refused now rather than after the measurement
        findings = BENCHMARKS[name](**given)
    except (ConfigError, ValueError) as error:
        options.error(str(error))
    except CheckpointError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return CHECKPOINT
    except (DataError, JudgeError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return DATA
    except (PeakError, TrainingError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return ENVIRONMENT
    except OSError as error:
        hint = "; check that it exists, is writable and has space" if error.filename else ""
        print(f"bench.py: {error}{hint}", file=sys.stderr)
        return ENVIRONMENT
    except NotEqualError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return NUMERICAL
    except KeyboardInterrupt:
        print("bench.py: interrupted", file=sys.stderr)
        return INTERRUPTED
    print(findings.text())
    print(findings.line(), flush=True)
    if out is not None:
        write_atomic(out / f"{name}.json", (findings.line() + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
