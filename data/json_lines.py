"""Files of JSON lines that a program adds to while it runs, such as a stage's `metrics.jsonl`.

A writer that is killed, or a full disk, leaves a last line without its end. It was never said, so readers
pass over it; a writer that goes on cuts it off first.
"""

import json
from pathlib import Path
from typing import Any


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of the lines that are whole; none where there is no file.

    Raises:
        ValueError: a line that has its end is no JSON.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
