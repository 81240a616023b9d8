"""What came out of a run, for people and for programs: a contact sheet, `report.html` and `report.json`.

The pictures are made from held-out captions with the averaged weights; nothing is picked by hand.
"""

import base64
import html
import io
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.json_lines import read_json_lines
from data.landscape_edits import draw_edit
from data.progress import Progress
from data.shards import Sample
from evaluation.adherence import AdherenceJudge, JudgeError, load_judge, save_judge, score, train_judge
from evaluation.editing import Edited, renders, score_edits
from models.loading import PICTURING
from models.pipeline import Pipeline
from models.sampling import Job, Sampling

#: Pictures on the contact sheet.
SHOWN = 48

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
 body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
        color: #1c2430; background: #fbfaf7 }}
 h1 {{ font-weight: 600 }} h2 {{ margin-top: 2.5rem; font-weight: 600 }}
 table {{ border-collapse: collapse }} td, th {{ padding: .3rem 1rem .3rem 0; text-align: left }}
 td {{ font-variant-numeric: tabular-nums }} img {{ max-width: 100%; height: auto }}
 pre {{ background: #f0eee8; padding: 1rem; overflow: auto }}
</style></head><body>
<h1>{title}</h1>
<table>{figures}</table>
{sections}
<h2>Configuration</h2><pre>{config}</pre>
</body></html>
"""


def contact_sheet(
    images: Tensor, captions: Sequence[str] | None = None, columns: int = 8, scale: int = 2
) -> Image.Image:
    """A sheet of pictures uint8 `[N 3 H W]`, in rows, each above its caption where captions are given.

    `scale` enlarges every pixel so many times.
    """
    N, _, H, W = images.shape
    text_height = 46 if captions is not None else 0
    gap = 6
    cell_w, cell_h = W * scale + gap, H * scale + gap + text_height
    rows = -(-N // columns)
    sheet = Image.new("RGB", (min(columns, N) * cell_w + gap, rows * cell_h + gap), (251, 250, 247))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, pixels in enumerate(images):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))
        sheet.paste(picture.resize((W * scale, H * scale), Image.Resampling.NEAREST), (x, y))
        if captions is not None:
            lines = _wrap(draw, captions[i], font, W * scale)[:3]
            draw.multiline_text((x, y + H * scale + 3), "\n".join(lines), (70, 76, 88), font, spacing=2)
    return sheet


def edit_sheet(before: Tensor, made: Tensor, after: Tensor, instructions: Sequence[str]) -> Image.Image:
    """A sheet of edits, three pictures each: before, as `made` over its instruction, after.

    Pictures are uint8 `[N 3 H W]`, and the `instructions` N.
    """
    pictures = torch.stack([before, made, after], 1).flatten(0, 1)
    captions = [text for instruction in instructions for text in ("before", instruction, "true after")]
    return contact_sheet(pictures, captions, columns=9)


def write_report(
    folder: Path,
    title: str,
    figures: Mapping[str, Any],
    pictures: Mapping[str, Image.Image],
    config: Mapping[str, Any],
) -> None:
    """Writes `report.json`, `report.html` and each picture as `<name>.png` into `folder`.

    Args:
        folder: of the run.
        title: of the page.
        figures: content of `report.json`; nested mappings are shown as rows of their own.
        pictures: heading -> picture; the file name is the heading in lower case with underscores.
        config: shown at the end of the page.
    """
    sections = []
    for heading, picture in pictures.items():
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        _write(folder / f"{heading.lower().replace(' ', '_')}.png", buffer.getvalue())
        sections.append(section(heading, picture))
    _write(folder / "report.html", page(title, figures, sections, config).encode())
    _write(folder / "report.json", (json.dumps(figures, indent=2) + "\n").encode())


def page(title: str, figures: Mapping[str, Any], sections: Sequence[str], config: Mapping[str, Any]) -> str:
    """A page of HTML that needs nothing beside it: figures as rows, sections of HTML, the configuration."""
    return _PAGE.format(
        title=html.escape(title),
        figures="".join(_rows("", figures)),
        sections="\n".join(sections),
        config=html.escape(json.dumps(config, indent=2)),
    )


def section(heading: str, picture: Image.Image, words: str = "") -> str:
    """HTML of a heading, a paragraph of `words` where there are some, and the picture within the page."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    told = f"<p>{html.escape(words)}</p>" if words else ""
    return (
        f'<h2>{html.escape(heading)}</h2>{told}<img src="data:image/png;base64,{data}" '
        f'alt="{html.escape(heading)}">'
    )


def make_report(
    folder: Path,
    pipeline: Pipeline,
    sampling: Sampling,
    samples: Sequence[Sample],
    judged: bool,
    began: float,
    config: Mapping[str, Any],
) -> None:
    """Makes pictures from the captions of held-out `samples` and writes the report of the run in `folder`.

    Args:
        folder: of the run, with its stages' metrics and checkpoints.
        pipeline: of the run.
        sampling: how to make the pictures.
        samples: held-out; the pictures made are compared with what their captions say.
        judged: whether the samples are landscapes, which the judge knows.
        began: `time.perf_counter()` when the run began.
        config: shown at the end of the page.
    """
    captions = [sample.caption for sample in samples]
    pairs = all(sample.before is not None for sample in samples)
    with Progress("sampling held-out prompts", len(captions)) as progress:
        made = pipeline.generate(
            [Job(sample.caption, k, before=sample.before) for k, sample in enumerate(samples)],
            sampling,
            progress=progress.update,
        )
    metrics = {
        stage: read_json_lines(folder / stage / "metrics.jsonl") for stage in ("autoencoder", *PICTURING)
    }
    figures: dict[str, Any] = {"run": folder.name}
    if judged:
        judge = find_judge(judge_folder(folder))
        images = made.float() / 127.5 - 1
        figures["adherence"] = score(judge, images, [sample.record for sample in samples])
        figures["judge"] = dict(judge.card.accuracies)
        if pairs:
            figures["editing"] = score_edits(judge, _edited(samples, made))
    figures |= {
        "psnr_db": _last(metrics["autoencoder"], "val_psnr_db"),
        "autoencoder_val_loss": _last(metrics["autoencoder"], "val_loss"),
        "diffusion_val_loss": _last(metrics["diffusion"], "val_loss"),
        "distillation_val_loss": _last(metrics["distillation"], "val_loss"),
        "images_seen": _images_seen([line for stage in PICTURING for line in metrics[stage]]),
        "autoencoder_images_seen": _images_seen(metrics["autoencoder"]),
        "seconds": time.perf_counter() - began,
    }
    real = torch.stack([sample.pixels for sample in samples[:SHOWN]])
    if pairs:
        before = torch.stack([sample.before for sample in samples[:SHOWN] if sample.before is not None])
        pictures = {"Contact sheet": edit_sheet(before, made[:SHOWN], real, captions[:SHOWN])}
    else:
        pictures = {
            "Contact sheet": contact_sheet(made[:SHOWN], captions[:SHOWN]),
            "Held-out images": contact_sheet(real, captions[:SHOWN]),
        }
    # Plotting takes a second to import, which making pictures need not wait for.
    from evaluation.curves import curves

    pictures["Curves"] = curves({stage: lines for stage, lines in metrics.items() if lines})
    write_report(folder, f"Firstlight: {folder.name}", figures, pictures, config)
    for line in _lines(figures):
        print(line)


def judge_folder(run: Path) -> Path:
    """Where the judge of the pictures of a `run` is kept: beside it, for all runs there."""
    return run.parent / "judge"


def kept_judge(folder: Path) -> AdherenceJudge | None:
    """The judge in `folder`; None where there is none that can be used."""
    try:
        return load_judge(folder)
    except JudgeError:
        return None


def find_judge(folder: Path) -> AdherenceJudge:
    """The judge kept in `folder`; trained and put there where there is none that can be used.

    Raises:
        OSError: the folder cannot be written.
    """
    judge = kept_judge(folder)
    if judge is None:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # refused now rather than after a minute of training
        with Progress("training the judge of landscapes, % done", 100) as progress:
            judge, _ = train_judge(seed=0, progress=lambda share: progress.update(round(100 * share)))
        save_judge(judge, folder)
    return judge


def _edited(samples: Sequence[Sample], made: Tensor) -> Edited:
    """Rendered pairs with the pictures `made` uint8 `[N 3 H W]` of them, beside their exact renders."""
    edits = [draw_edit(int(sample.record["seed"]), int(sample.record["index"])) for sample in samples]
    side = made.shape[-1]
    before = renders([edit.before for edit in edits], side)
    return Edited(edits, before, made, renders([edit.after for edit in edits], side))


def _last(metrics: Sequence[Mapping[str, float]], key: str) -> float | None:
    return next((line[key] for line in reversed(metrics) if key in line), None)


def _images_seen(metrics: Sequence[Mapping[str, float]]) -> float | None:
    """The most there is: figures of an evaluation come later than the images they belong to."""
    return max((line["images"] for line in metrics), default=None)


def _lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures a person looks for first, a line each."""
    lines = []
    if "adherence" in figures:
        shares = ", ".join(f"{key} {value:.1%}" for key, value in figures["adherence"].items())
        lines.append(f"Adherence of pictures to their prompts: {shares}")
    if "editing" in figures:
        kept = ", ".join(f"{key} {value:.1%}" for key, value in figures["editing"]["kept"].items())
        lines.append(f"Edits that did what they were told: {figures['editing']['changed']:.1%}; kept {kept}")
    if figures["psnr_db"] is not None:
        lines.append(f"Held-out reconstruction: {figures['psnr_db']:.2f} dB PSNR")
    return lines


def _rows(prefix: str, figures: Mapping[str, Any]) -> list[str]:
    rows = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            rows += _rows(f"{prefix}{key} ", value)
        elif value is not None:
            shown = (
                f"{value:,.4g}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            rows.append(f"<tr><th>{html.escape(prefix + key)}</th><td>{html.escape(str(shown))}</td></tr>")
    return rows


def _wrap(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and draw.textlength(longer, font) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    return [*lines, line]


def _write(path: Path, content: bytes) -> None:
    """Replaces a file whole, so that a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
