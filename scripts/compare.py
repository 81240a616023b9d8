"""Prints cards of `scripts/evaluate.py` side by side, with intervals, and refuses those that are unlike.

    python scripts/compare.py runs/a/evaluation/24000-1f2e3d4c runs/b/evaluation/24000-5a6b7c8d
    python scripts/compare.py A/card.json B/card.json --kinds adherence variety --strict

Figures are comparable where the number of pictures, the prompts, the feature network and the real pictures
are the same. Sampler settings and checkpoints may differ, as these are what one compares; --strict wants the
settings equal too.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.index import DataError
from evaluation.card import NEEDS
from evaluation.compare import as_text, compare, kinds_of, read, refuse_unlike
from models.registry import ConfigError

UNLIKE, DATA, INTERRUPTED = 2, 3, 130


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(
        prog="compare.py", description=description, epilog=notes,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    options.add_argument("cards", nargs="+", type=Path, metavar="CARD", help="a card.json, or its folder")
    options.add_argument("--kinds", nargs="+", choices=NEEDS, help="of figures (all that the cards have)")
    options.add_argument("--strict", action="store_true", help="refuse other sampler settings as well")
    options.add_argument("--resamples", type=int, default=100, help="for the intervals (%(default)s)")
    return options


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for unlike cards or a wrong option, 3 for a card that is damaged or was changed."""
    options = parser()
    given = options.parse_args(argv)
    if len(given.cards) < 2 or given.resamples < 2:
        options.error("give at least two cards, and 2 resamples")
    try:
        cards = [read(path) for path in given.cards]
        kinds = given.kinds or kinds_of(cards)
        if not kinds:
            raise ConfigError("these cards have no figure in common; evaluate both in the same way")
        refuse_unlike(cards, kinds, given.strict)
        print(as_text(cards, compare(cards, kinds, given.resamples)))
    except (ConfigError, DataError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return UNLIKE if isinstance(error, ConfigError) else DATA
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
