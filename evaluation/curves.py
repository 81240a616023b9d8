"""Losses and figures over the images seen, drawn; apart, as plotting takes a second to import."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot

#: Charts of evaluations made while a run trained: title -> figure -> what it is called.
_EVALUATED = {
    "Frechet distance": {"eval_fd": "made", "eval_fd_floor": "floor: training pictures"},
    "Different pictures of a prompt": {
        "eval_variety_different": "made", "eval_variety_different_real": "real"
    },
    "Shows what was asked for": {"eval_adherence_all": "made", "eval_adherence_all_real": "real"},
}  # fmt: skip


def curves(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> Image.Image:
    """Losses of each stage over the images seen, and the figures of evaluations, as a picture."""
    charts: list[tuple[str, Sequence[Mapping[str, float]], Mapping[str, str]]] = [
        (stage, lines, {"train_loss": "training", "val_loss": "held out"}) for stage, lines in metrics.items()
    ]
    for title, figures in _EVALUATED.items():
        found = [line for each in metrics.values() for line in each if figures.keys() & line.keys()]
        charts += [(title, found, figures)] if found else []
    figure, axes = pyplot.subplots(
        1, max(len(charts), 1), figsize=(5.5 * max(len(charts), 1), 3.6), squeeze=False
    )
    for axis, (title, lines, names) in zip(axes[0], charts, strict=False):
        for key, label in names.items():
            points = sorted((line["images"], line[key]) for line in lines if key in line)
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 12 else None)
        axis.set(title=title, xlabel="images seen")
        if title in metrics:
            axis.set(ylabel="loss", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    pyplot.close(figure)
    return Image.open(buffer)
