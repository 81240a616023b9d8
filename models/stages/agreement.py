"""One configuration on all ranks, asserted before anything is built from it.

A launcher that gives two ranks different hyper-parameters looks like training that works: each of Hydra's
`--multirun` jobs that started ranks of its own did so.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from models.registry import ConfigError
from models.stages.depends import flatten
from models.stages.ranks import Ranks, listed


def require_same_config(config: Mapping[str, Any], ranks: Ranks) -> str:
    """The SHA-256 of the configuration that every rank has.

    Raises:
        ConfigError: they have different ones; names ranks and the first keys that differ.
    """
    text = json.dumps(config, sort_keys=True)
    hashes = ranks.gather_text(hashlib.sha256(text.encode()).hexdigest())
    others = [rank for rank, each in enumerate(hashes) if each != hashes[0]]
    if not others:
        return hashes[0]
    every = [flatten(values, tuple(values)) for values in map(json.loads, ranks.gather_text(text))]
    first, other = every[0], every[others[0]]
    differ = [
        f"{key} is {other.get(key)!r} there and {first.get(key)!r} on rank 0"
        for key in sorted(first.keys() | other.keys())
        if key not in first or key not in other or first[key] != other[key]
    ]
    more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
    raise ConfigError(
        f"{listed(others)} {'has' if len(others) == 1 else 'have'} another configuration than rank 0: "
        f"{'; '.join(differ[:3])}{more}; give every rank the same command"
    )
