"""What a dataset is, short enough for a checkpoint, and what has changed between two such descriptions.

Up to a thousand shards are described one by one; of more, groups of neighbours in the order of names, whose
borders depend on the names alone, so that a shard that comes or goes changes one group. Use:
`kept = view.describe()`; later `diff(kept, view.describe())`.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

SINGLE = 1000  # shards described one by one
GROUPS = 512  # about so many groups of more
MOST_LINES = 24
DIGITS = 16  # of a SHA-256 in hex
WHOLE = f"{1 << 64:x}"  # where the split keeps every key

Row = tuple[str, str, int]  # name, SHA-256 in hex, count


def describe_shards(rows: Iterable[Row]) -> dict[str, Any]:
    """Returns {"shards": {name: [samples, hash]}} or {"every": k, "groups": {name: [shards, samples, hash]}}.

    Names are those of the shards without the folder that all share; JSON of less than 100 kB.
    """
    listed = sorted(rows)
    cut = _shared_folder([name for name, _, _ in listed])
    if len(listed) <= SINGLE:
        return {"shards": {name[cut:]: [count, sha256[:DIGITS]] for name, sha256, count in listed}}
    every = 1 << ((len(listed) // GROUPS).bit_length() - 1)
    groups: dict[str, list[Any]] = {}
    digest, first = hashlib.sha256(), ""
    for name, sha256, count in listed:
        if not first or _starts_group(name[cut:], every):
            first, digest = name[cut:], hashlib.sha256()
            groups[first] = [0, 0, ""]
        digest.update(f"{name[cut:]} {sha256} {count}\n".encode())
        shards, samples, _ = groups[first]
        groups[first] = [shards + 1, samples + count, digest.hexdigest()[:DIGITS]]
    return {"every": every, "groups": groups}


def diff(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what changed between two descriptions, a line each, at most 25; none where nothing did."""
    lines = []
    for label in ("filter", "unique", "split"):
        was, becomes = _say(label, before), _say(label, now)
        if was != becomes:
            lines.append(f"{label} was {was}, now {becomes}")
    if "shards" in before and "shards" in now:
        lines += _shards(before["shards"], now["shards"])
    elif "groups" in before and "groups" in now and before["every"] == now["every"]:
        lines += _groups(before["groups"], now["groups"])
    else:
        (shards, samples), (new_shards, new_samples) = _totals(before), _totals(now)
        lines.append(
            f"~ {shards:,} shards of {samples:,} samples -> {new_shards:,} shards of {new_samples:,} samples"
        )
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"... and {len(lines) - MOST_LINES:,} more changes"]
    return lines


def _shared_folder(names: list[str]) -> int:
    """Returns how many characters the folder takes that all names lie in, its slash too; names are sorted."""
    first, last = (names[0], names[-1]) if names else ("", "")
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first.rfind("/", 0, same) + 1


def _starts_group(name: str, every: int) -> bool:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % every == 0


def _say(label: str, described: Mapping[str, Any]) -> str:
    if label == "filter":
        return repr(described["where"]) if described.get("where") else "none"
    if label == "unique":
        return "on" if described.get("unique") else "off"
    low, high = (int(described.get(side, default), 16) for side, default in (("low", "0"), ("high", WHOLE)))
    return f"{(high - low) / 2**64:.4%} of the keys, from {low / 2**64:.4%} on (data.val_fraction)"


def _shards(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, ()), now.get(name, ())
        if not old:
            lines.append(f"+ {name} ({new[0]:,} samples)")
        elif not new:
            lines.append(f"- {name} ({old[0]:,} samples)")
        elif list(old) != list(new):
            counts = f"{old[0]:,} -> {new[0]:,}" if old[0] != new[0] else f"{old[0]:,}"
            lines.append(f"~ {name}: {counts} samples{', other bytes' if old[1] != new[1] else ''}")
    return lines


def _groups(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name, ()), now.get(name, ())
        if not old:
            lines.append(f"+ {name} and what follows: {new[0]:,} shards, {new[1]:,} samples")
        elif not new:
            lines.append(f"- {name} and what follows: {old[0]:,} shards, {old[1]:,} samples")
        elif list(old) != list(new):
            lines.append(
                f"~ {name} and what follows: {old[0]:,} shards of {old[1]:,} samples -> "
                f"{new[0]:,} shards of {new[1]:,} samples, other bytes"
            )
    return lines


def _totals(described: Mapping[str, Any]) -> tuple[int, int]:
    if "groups" in described:
        groups = described["groups"].values()
        return sum(group[0] for group in groups), sum(group[1] for group in groups)
    shards = described.get("shards", {})
    return len(shards), sum(shard[0] for shard in shards.values())
