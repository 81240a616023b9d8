"""Which text a sample is trained with, of those it has: fields of the tar and values of its JSON, by chance.

Use: `CaptionChoice({"txt": 0.5, "json.long": 0.5})`.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from typing import Any

from data.fields import BadSample, decode_caption
from data.index import DataError

JSON = "json."


class CaptionChoice:
    """Chooses among caption fields with given probabilities, shared out anew among those that are there.

    A name is a field (`txt`) or `json.NAME`, a text at the top of the JSON field. Raises ValueError for
    probabilities that are negative or all 0.
    """

    def __init__(self, fields: Mapping[str, float]) -> None:
        if any(not math.isfinite(p) or p < 0 for p in fields.values()) or not sum(fields.values()) > 0:
            raise ValueError(f"captions={dict(fields)}; probabilities must be 0 or more, and not all 0")
        self.fields = {name: float(p) for name, p in fields.items() if p}
        #: Whether captions are the field txt and nothing else.
        self.is_plain = list(self.fields) == ["txt"]
        self.needs_json = any(name.startswith(JSON) for name in self.fields)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields of the tar that captions come from."""
        own = tuple(name for name in self.fields if not name.startswith(JSON))
        return (*own, "json") if self.needs_json else own

    def choose(
        self, take: Callable[[str], bytes | None], record: Mapping[str, Any], draw: Callable[[], float]
    ) -> str:
        """Returns the caption, "" where there is none that is not blank.

        `take` gives the bytes of a field, None where it is absent; `record` is the JSON; `draw` a number in
        [0, 1). Raises BadSample for text that cannot be used.
        """
        if self.is_plain:
            data = take("txt")
            return decode_caption(data) if data else ""
        texts, shares = [], []
        for name, share in self.fields.items():
            if name.startswith(JSON):
                text = _from_record(record, name)
            else:
                data = take(name)
                text = decode_caption(data, name) if data else ""
            if text:
                texts.append(text)
                shares.append(share)
        if len(texts) < 2:
            return texts[0] if texts else ""
        ends = list(accumulate(shares))
        return texts[min(bisect_right(ends, draw() * ends[-1]), len(texts) - 1)]

    def check(self, shards: str, fields: Collection[str], records: Callable[[], Collection[str]]) -> None:
        """Raises DataError where a caption field occurs nowhere in `shards`, listing what does.

        `fields` are the fields of the tars, `records` gives the names of texts in their first JSON records.
        """
        for name in self.fields:
            field = "json" if name.startswith(JSON) else name
            if field not in fields:
                # Captions may be missing altogether: that is for data.missing_caption to decide.
                if self.is_plain:
                    continue
                raise DataError(
                    f"{shards}: captions name {name!r}, but no shard has the field {field!r}; "
                    f"there are {', '.join(sorted(fields))}; correct data.captions"
                )
        if not self.needs_json:
            return
        found = records()
        for name in self.fields:
            if name.startswith(JSON) and name.removeprefix(JSON) not in found:
                known = ", ".join(JSON + other for other in sorted(found)) or "none"
                raise DataError(
                    f"{shards}: captions name {name!r}, which no JSON record at the start of the shards has; "
                    f"texts there: {known}; correct data.captions"
                )


def _from_record(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name.removeprefix(JSON))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadSample(name, f"the JSON holds a {type(value).__name__} there, not a text")
    return decode_caption(value.encode("utf-8", "surrogatepass"), name)
