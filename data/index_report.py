"""The findings about a dataset as a page and as advice: what was found, what it means, what to do about it.

The page is one file without scripts or anything from elsewhere; every word of the data is escaped. The advice
comes first, worst first, and is what `scripts/index.py` prints too. Use: `write_report(folder, report)`.
"""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.arrays import write_atomic

Json = Mapping[str, Any]

STOPS, LOOK, FINE = "stops training", "worth a look", "fine"
SHOWN = 100  # damaged shards on the page; all are in report.json
WHERE = "'data.where={}'"  # as a shell takes it
LONG = 400  # characters of a caption that are shown

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem;
        color: #1c2430; background: #fbfaf7; overflow-wrap: anywhere }}
 h1, h2, h3 {{ font-weight: 600 }} h2 {{ margin-top: 2.5rem }}
 table {{ border-collapse: collapse }} td, th {{ padding: .2rem 1rem .2rem 0; text-align: left;
        vertical-align: top; font-weight: 400 }} td {{ font-variant-numeric: tabular-nums }}
 li {{ margin-bottom: .6rem }} code {{ background: #f0eee8; padding: 0 .2rem }}
 .stops {{ color: #a1260d; font-weight: 600 }} .worth {{ color: #8a6100; font-weight: 600 }}
 .fine {{ color: #2c6e37; font-weight: 600 }} svg {{ display: block; margin: .5rem 0 1rem }}
 svg rect {{ fill: #6a87b8 }} svg text {{ font: 12px system-ui, sans-serif; fill: #1c2430 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Advice:
    """One finding in a sentence, how much it matters, and what to do; all plain text."""

    weight: str
    finding: str
    remedy: str


def advise(part: Json) -> list[Advice]:
    """Returns what to do about the findings of one part of a report, worst first."""
    found = [*_shards(part)]
    if part.get("samples"):
        found += [*_keys(part), *_fields(part), *_captions(part), *_pictures(part), *_duplicates(part)]
    ranks = {STOPS: 0, LOOK: 1, FINE: 2}
    return sorted(found, key=lambda advice: ranks[advice.weight])


def write_report(folder: Path, report: Json) -> tuple[Path, Path]:
    """Returns the paths of `report.json` and `report.html` after writing them; raises OSError."""
    paths = folder / "report.json", folder / "report.html"
    write_atomic(
        paths[0], (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    )
    write_atomic(paths[1], page(report).encode("utf-8", "replace"))
    return paths


def page(report: Json) -> str:
    """Returns the page of a report, self-contained HTML."""
    parts = [
        (f"<h2>{_text(part['name'])}</h2>\n" if part["name"] else "") + _part(part)
        for part in report["parts"]
    ]
    nexts = "".join(f"<p>Next: <code>{_text(line)}</code></p>" for line in report["next"])
    return _PAGE.format(title=f"Dataset {_text(report['shards'])}", body="\n".join(parts) + nexts)


# --- advice -------------------------------------------------------------------------------------------------


def _shards(part: Json) -> Iterable[Advice]:
    count = len(part["damaged"])
    if count and part["left_out"]:
        yield Advice(
            LOOK,
            f"{count:,} of {part['shards']:,} shards are damaged or missing, and left out.",
            "Copy or make them again and run this command again, and they are back in.",
        )
    elif count:
        yield Advice(
            STOPS,
            f"{count:,} of {part['shards']:,} shards are damaged or missing (listed below).",
            "Copy or make them again and run this command again: the others are not read again. To train "
            "without them, add --leave-out-damaged.",
        )
    else:
        yield Advice(FINE, f"All {part['shards']:,} shards are whole.", "Nothing to do.")


def _keys(part: Json) -> Iterable[Advice]:
    twice = part["repeated_keys"]
    if twice["count"]:
        example = twice["examples"][0]
        yield Advice(
            STOPS,
            f"{'At least ' if twice['more'] else ''}{twice['count']:,} keys occur in two shards, such as "
            f"{example[0]!r} in {example[1]} and {example[2]}.",
            "A key names one sample. If a shard was copied twice, delete one copy; else write the shards "
            "again with keys that are unique, for instance with the shard's name in front.",
        )


def _fields(part: Json) -> Iterable[Advice]:
    samples, fields = part["samples"], part["fields"]
    partly = [f"{name} ({held['missing']:,})" for name, held in fields.items() if held["missing"]]
    if partly and not {"jpg", "png", "webp", "jpeg"} >= {name.split(" ")[0] for name in partly}:
        yield Advice(
            LOOK,
            f"Some samples lack a field: {', '.join(partly)} of {samples:,}.",
            "Harmless where the field is optional. Samples without a picture are replaced by others in "
            "training; for captions see below.",
        )
    if part["bad_json"]:
        yield Advice(
            LOOK,
            f"The JSON of {part['bad_json']:,} samples cannot be read.",
            "Filters take their values as absent. Mend what writes them: UTF-8, an object, no NaN, no name "
            "twice, at most 256 KiB.",
        )
    if part["ignored"]:
        yield Advice(
            LOOK,
            f"{part['ignored']:,} files in the shards have no field in their name (KEY.FIELD): ignored.",
            "Fine for a README; else name the files KEY.jpg, KEY.txt, KEY.json.",
        )


def _captions(part: Json) -> Iterable[Advice]:
    captions, samples = part["captions"], part["samples"]
    without = captions["absent"] + captions["empty"]
    if without:
        yield Advice(
            STOPS if without == samples else LOOK,
            f"{without:,} of {samples:,} samples have no caption ({captions['absent']:,} absent, "
            f"{captions['empty']:,} empty).",
            "They are passed over in training. To train on them without a caption, set "
            "data.missing_caption=UNCONDITIONAL; or name another field of captions.",
        )
    if part["bad_captions"]:
        yield Advice(
            LOOK,
            f"{part['bad_captions']:,} captions cannot be read (no UTF-8, or more than 16 KiB).",
            "Their samples are replaced in training, and too many stop it. Save them as UTF-8 text.",
        )
    for frequent in captions["frequent"][:1]:
        if frequent["times"] > max(10, 0.01 * samples):
            text = _short(frequent["text"] or "(not read)", 80)
            yield Advice(
                LOOK,
                f"One caption occurs {frequent['times']:,} times: {text!r}.",
                "Right for class labels. If it is a placeholder of a website, remove those captions, or the "
                "model learns it.",
            )


def _pictures(part: Json) -> Iterable[Advice]:
    images, samples = part["images"], part["samples"]
    if "moments.npy" in part["fields"]:
        return  # precomputed: pictures are not needed
    if images["missing"]:
        yield Advice(
            STOPS if images["missing"] == samples else LOOK,
            f"{images['missing']:,} of {samples:,} samples have no picture (jpg, jpeg, png or webp).",
            "They cannot be trained on, and too many stop a run. Leave them out with a filter such as "
            f"{WHERE.format('width > 0')}, or write the shards again.",
        )
    broken = images["unknown_size"] + part["bad_images"]
    if broken:
        yield Advice(
            LOOK,
            f"{broken:,} pictures cannot be opened (damaged, or of another kind under an image's name).",
            f"They are replaced in training, and too many stop it. {WHERE.format('width > 0')} leaves out "
            "those whose size is unknown.",
        )
    small = sum(count for edge, count in images["short_sides"] if edge < 128)
    if small and small < samples:
        yield Advice(
            LOOK,
            f"{small:,} pictures have a side of less than 128 pixels.",
            "At a higher resolution they are enlarged and blurred: leave them out with "
            f"{WHERE.format('width >= 256 and height >= 256')}, the numbers being your data.resolution.",
        )


def _duplicates(part: Json) -> Iterable[Advice]:
    found = part["duplicates"]
    if found is None:
        return
    near = found["near"]
    if found["extra"]:
        also = f", {near['extra']:,} of them only nearly the same" if near else ""
        yield Advice(
            LOOK,
            f"{found['extra']:,} pictures are duplicates of others{also}.",
            "Set data.unique=true to train on the first of each only: else they are learned by heart, and "
            "the same picture may be trained on and held out.",
        )
    else:
        yield Advice(FINE, "No picture occurs twice.", "Nothing to do.")
    if near is None:
        yield Advice(
            FINE,
            "Resized and recompressed copies were not looked for.",
            "Run again with --perceptual-hash, which decodes every picture once.",
        )


# --- the page -----------------------------------------------------------------------------------------------


def _part(part: Json) -> str:
    items = [
        f'<li><span class="{advice.weight.split()[0]}">{advice.weight}</span>: {_text(advice.finding)}<br>'
        f"{_text(advice.remedy)}</li>"
        for advice in advise(part)
    ]
    sections = [
        _table([("shards", part["shards"]), ("samples", part["samples"]), ("bytes", part["bytes"]),
                ("fingerprint", part["fingerprint"])]),
        f"<h3>What to do</h3><ul>{''.join(items)}</ul>",
        _damaged(part["damaged"]),
    ]  # fmt: skip
    if part["samples"]:
        sections += [_pictures_section(part), _captions_section(part), _columns_section(part)]
        sections += [_duplicates_section(part["duplicates"]), _repeated_section(part["repeated_keys"])]
    return "\n".join(section for section in sections if section)


def _damaged(damaged: Sequence[Json]) -> str:
    if not damaged:
        return ""
    rows = "".join(f"<li>{_text(each['problem'])}</li>" for each in damaged[:SHOWN])
    more = f"<p>and {len(damaged) - SHOWN:,} more in report.json</p>" if len(damaged) > SHOWN else ""
    return f"<h3>Damaged shards</h3><ul>{rows}</ul>{more}"


def _pictures_section(part: Json) -> str:
    images = part["images"]
    sides = [(name, _spread(images[name])) for name in ("width", "height") if name in images]
    return (
        "<h3>Pictures</h3>" + _table([("without a picture", images["missing"]), *sides])
        + _bars("short side, pixels from", images["short_sides"])
        + _bars("width over height, from", images["aspects"])
    )  # fmt: skip


def _captions_section(part: Json) -> str:
    captions = part["captions"]
    rows: list[tuple[str, Any]] = [
        ("absent", captions["absent"]), ("empty", captions["empty"]), ("distinct", captions["distinct"]),
        ("median length, words", captions["median_words"]), ("longest, words", captions["most_words"]),
    ]  # fmt: skip
    text = "<h3>Captions</h3>" + _table(rows) + _bars("words from", captions["words"])
    if captions["frequent"]:
        listed = [(_caption(each), each["times"]) for each in captions["frequent"]]
        text += "<h4>Most frequent</h4>" + _table(listed)
    if "longest" in captions:
        longest = captions["longest"]
        where = f"{longest['shard']}, key {longest['key']}"
        text += f"<h4>Longest</h4><p>{_text(_caption(longest))}<br>({_text(where)})</p>"
    return text


def _columns_section(part: Json) -> str:
    rows = [(name, f"{held['samples']:,} samples, {_spread(held)}") for name, held in part["numbers"].items()]
    texts = [
        (name, f"{held['samples']:,} samples, {_many(held['distinct'])} different texts")
        for name, held in part["strings"].items()
    ]
    if not rows and not texts:
        return ""
    example = f"{texts[0][0]} == 'TEXT'" if texts else ""
    if rows:
        example = f"{rows[0][0]} >= {part['numbers'][rows[0][0]]['median']:g}"
    use = f"Filters use these names, for instance <code>{_text(WHERE.format(example))}</code>"
    return f"<h3>Values of the JSON</h3><p>{use}</p>" + _table(rows) + _table(texts)


def _duplicates_section(found: Json | None) -> str:
    if found is None or not found["extra"]:
        return ""
    text = "<h3>Duplicates</h3>"
    for title, kind in (("The same bytes", found["identical"]), ("Nearly the same", found["near"])):
        if kind and kind["groups"]:
            rows = [
                (
                    f"{each['times']:,} pictures",
                    "; ".join(f"{one['shard']} key {one['key']}" for one in each["first"]),
                )
                for each in kind["examples"]
            ]
            text += f"<h4>{title}: {kind['groups']:,} groups, {kind['extra']:,} too many</h4>" + _table(rows)
    return text


def _repeated_section(twice: Json) -> str:
    if not twice["count"]:
        return ""
    rows = [(key, f"{shard} and {other}") for key, shard, other in twice["examples"]]
    return "<h3>Keys in two shards</h3>" + _table(rows)


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    lines = []
    for name, value in rows:
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            lines.append(f"<tr><th>{_text(name)}</th><td>{_text(shown)}</td></tr>")
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _bars(title: str, bars: Sequence[Sequence[float]]) -> str:
    """Returns a histogram as SVG: a bar for each [from, count], the empty ones at both ends left out."""
    full = [place for place, (_, count) in enumerate(bars) if count]
    if not full:
        return ""
    shown = bars[full[0] : full[-1] + 1]
    most, total = max(count for _, count in shown), sum(count for _, count in shown)
    rows = []
    for place, (edge, count) in enumerate(shown):
        y, width = 20 * place, 420 * count / most
        label = f"{edge:.3g}" if isinstance(edge, float) else f"{edge:,}"
        rows.append(
            f'<text x="60" y="{y + 14}" text-anchor="end">{label}</text>'
            f'<rect x="70" y="{y + 2}" width="{width:.1f}" height="15"/>'
            f'<text x="{76 + width:.1f}" y="{y + 14}">{count:,} ({count / total:.1%})</text>'
        )
    height = 20 * len(shown)
    label = html.escape(title, quote=True)
    return (
        f'<p>{_text(title)}</p><svg width="640" height="{height}" viewBox="0 0 640 {height}" role="img" '
        f'aria-label="{label}">{"".join(rows)}</svg>'
    )


def _caption(each: Json) -> str:
    text = each["text"]
    return f"(shard not read here) key {each['key']}" if text is None else _short(text, LONG)


def _spread(held: Json) -> str:
    return f"{held['min']:,.6g} to {held['max']:,.6g}, median {held['median']:,.6g}"


def _many(distinct: int) -> str:
    return f"{distinct:,}" if distinct <= 1000 else "more than 1,000"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _text(value: str) -> str:
    return html.escape(value, quote=True)
