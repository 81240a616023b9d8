"""The page beside a card: figures with their floors, pictures, what repeats, each category.

It needs nothing beside it and no network.
"""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.arrays import write_atomic
from evaluation.asks import Real
from evaluation.card import Card, kind_of
from evaluation.curves import pyplot
from evaluation.diversity import PromptVariety, Variety
from evaluation.measure import Made, Measured
from evaluation.report import contact_sheet, page, section

PAGE = "report.html"
#: Pictures on a sheet, and prompts whose pictures are shown as the most alike.
SHOWN, WORST = 48, 6


def write_page(
    folder: Path, title: str, card: Card, made: Made, real: Real | None, measured: Measured
) -> Path:
    """Writes `report.html` into `folder` and returns its path.

    Args:
        folder: of the card.
        title: of the page.
        card: whose figures are shown.
        made: the pictures, in the order that `measured` numbers them in.
        real: held-out pictures of the same prompts; None for a suite.
        measured: what is shown besides.
    """
    sections = [_alarms(card.alarms), _figures(card.metrics)]
    captions = [ask.text for ask in made.asks[:SHOWN]]
    sections.append(section("Pictures made", contact_sheet(made.pictures[:SHOWN], captions)))
    if real is not None:
        sheet = contact_sheet(real.pictures[:SHOWN], captions)
        sections.append(section("Real pictures of the same prompts", sheet))
    if measured.variety is not None:
        sections += _sameness(measured.variety, made.varied)
    if measured.copies is not None:
        words = "Each made picture stands before the training picture that it copies."
        sections.append(section("Copies of training pictures", measured.copies, words))
    if "reference" in measured.features:
        sections.append(_map(measured.features["made"], measured.features["reference"]))
    if measured.categories:
        sections.append(_categories(measured.categories))
    told = {"measured": dict(card.measured), "made": dict(card.made)}
    figures = {"checkpoint": card.made["checkpoint_sha256"], "pictures": len(made.pictures)}
    write_atomic(folder / PAGE, page(title, figures, [each for each in sections if each], told).encode())
    return folder / PAGE


def _alarms(alarms: Sequence[str]) -> str:
    return "".join(f"<p><strong>{html.escape(alarm)}</strong></p>" for alarm in alarms)


def _figures(metrics: Mapping[str, float]) -> str:
    """A table of each figure, its floor and its standard error, a heading for each kind."""
    rows, before = [], ""
    for name, value in metrics.items():
        if name.endswith(("_floor", "_se", "_real")):
            continue
        if kind_of(name) != before:
            before = kind_of(name)
            rows.append(f"<tr><th>{before}</th><th></th><th>floor or real</th><th>standard error</th></tr>")
        beside = [metrics.get(f"{name}_floor", metrics.get(f"{name}_real")), metrics.get(f"{name}_se")]
        shown = "".join(f"<td>{'' if each is None else f'{each:.4g}'}</td>" for each in (value, *beside))
        rows.append(f"<tr><td>{html.escape(name)}</td>{shown}</tr>")
    told = (
        "A floor is what training pictures measure in place of the made ones; real ones are beside the rest."
    )
    return f"<h2>Figures</h2><p>{told}</p><table>{''.join(rows)}</table>"


def _sameness(variety: Variety, pictures: Tensor) -> list[str]:
    """A chart of all prompts and the pictures of the most alike."""
    sections = [section("Variety", _chart(variety), "How many of a prompt's pictures are different.")]
    for row in variety.rows[:WORST]:
        numbers = list(row.pictures)
        words = (
            f"{row.made.different:.1f} different of {len(numbers)}, real ones "
            f"{row.level.real.different:.1f} of {row.level.count}: {row.sameness:.0%} same{_verdict(row)}."
        )
        sections.append(section(f"Sameness: {row.prompt}", contact_sheet(pictures[numbers], scale=1), words))
    return sections


def _verdict(row: PromptVariety) -> str:
    return ", pictures repeat" if row.collapsed else ", narrower than any real set" if row.narrow else ""


def _chart(variety: Variety) -> Image.Image:
    figure, axis = pyplot.subplots(figsize=(9, 0.6 + 0.3 * max(len(variety.rows), 1)))
    rows = variety.rows[::-1]
    axis.barh(range(len(rows)), [row.level.real.different for row in rows], color="#d9d4c7", label="real")
    axis.barh(
        range(len(rows)), [row.made.different for row in rows], height=0.4, color="#3a6ea5", label="made"
    )
    axis.set_yticks(range(len(rows)), [row.prompt[:60] for row in rows], fontsize=7)
    axis.set_xlabel("different pictures")
    axis.legend()
    return _drawn(figure)


def _map(made: Tensor, real: Tensor) -> str:
    """The features on the two axes along which the real ones vary most."""
    centre = real.double().mean(0)
    _, _, axes = torch.linalg.svd(real.double() - centre, full_matrices=False)
    figure, axis = pyplot.subplots(figsize=(6, 5))
    for rows, label, colour in ((real, "real", "#c9a227"), (made, "made", "#3a6ea5")):
        x, y = ((rows.double() - centre) @ axes[:2].T).T.tolist()
        axis.scatter(x, y, s=8, alpha=0.5, label=label, color=colour)
    axis.legend()
    words = "Features on the two axes along which real pictures vary most."
    return section("Features", _drawn(figure), words)


def _categories(categories: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for figures in categories.values() for name in figures))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("category", *names))
    rows = [
        f"<tr><td>{html.escape(category)}</td>"
        + "".join(f"<td>{figures.get(name, float('nan')):.4g}</td>" for name in names)
        + "</tr>"
        for category, figures in categories.items()
    ]
    return f"<h2>Categories</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _drawn(figure: "pyplot.Figure") -> Image.Image:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return Image.open(buffer)
