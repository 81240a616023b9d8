"""Does an edit do what it was told, and nothing else? Measured on landscapes, whose true edit is known.

Each edit changes one of four factors. The judge of `evaluation.adherence` reads the picture that was made: is
the asked factor the new one, and are the other three what they were? Beside it stand errors in levels of 255.
The unedited region is where the exact renders before and after differ by less than `SAME` levels in every
channel, such as the land where the sky was cleared; there the picture should be what it was. The error
against the exact render after the edit is an upper figure: a new terrain may look in many ways, of which the
render is one. `ceiling` and `doing_nothing` measure the exact renders, so that a figure has both its ends.

    before, after = (renders(scenes, 64) for scenes in zip(*[(edit.before, edit.after) for edit in edits]))
    score_edits(judge, Edited(edits, before, made, after))["changed"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.landscape_edits import Edit
from data.landscapes import FACTORS, Scene, factors, render
from evaluation.adherence import AdherenceJudge

#: Pixels of two renders that differ by fewer levels of 255 are the same.
SAME = 2


@dataclass(frozen=True)
class Edited:
    """Edits and their pictures, uint8 `[N 3 H W]` each: before, as `made`, and the exact render after."""

    edits: Sequence[Edit]
    before: Tensor
    made: Tensor
    after: Tensor


def score_edits(judge: AdherenceJudge, edited: Edited) -> dict[str, Any]:
    """Figures of edits, as JSON values; shares lie in [0, 1] and errors in levels of 255.

    `changed`: of all edits, the asked factor is the new one; `changed_by_factor`: of each kind of edit.
    `kept`: {factor: of the edits that ask for another factor, this one is as before}. `all`: all four are as
    after. `error`: mean absolute difference from the exact render; `unedited_error`: that from the picture
    before in the region no edit should touch, which is a share `unedited_share` of all pixels. `ceiling` and
    `doing_nothing` hold the same for the exact render after and for the picture before.
    """
    return {
        "edits": len(edited.edits),
        **_figures(judge, edited, edited.made),
        "unedited_share": float(_unedited(edited).float().mean()),
        "ceiling": _figures(judge, edited, edited.after),
        "doing_nothing": _figures(judge, edited, edited.before),
    }


def renders(scenes: Sequence[Scene], resolution: int) -> Tensor:
    """The exact pictures of `scenes`, uint8 `[N 3 H W]`."""
    pixels = np.stack([render(scene, resolution) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _figures(judge: AdherenceJudge, edited: Edited, pictures: Tensor) -> dict[str, Any]:
    seen = judge.predict(pictures.float() / 127.5 - 1)
    right = {name: seen[name] == _classes(name, edited.edits) for name in FACTORS}
    asked = {name: torch.tensor([edit.factor == name for edit in edited.edits]) for name in FACTORS}
    changed = torch.stack([right[name] & asked[name] for name in FACTORS]).any(0)
    error = (pictures.float() - edited.after.float()).abs()
    moved = (pictures.float() - edited.before.float()).abs().mean(1)[_unedited(edited)]
    return {
        "changed": _share(changed),
        "changed_by_factor": {name: _share(right[name][asked[name]]) for name in FACTORS},
        "kept": {name: _share(right[name][~asked[name]]) for name in FACTORS},
        "all": _share(torch.stack(list(right.values())).all(0)),
        "error": float(error.mean()),
        "unedited_error": float(moved.mean()) if len(moved) else None,
    }


def _classes(name: str, edits: Sequence[Edit]) -> Tensor:
    """The classes int64 [N] of a factor after the edits, which for factors not asked for are those before."""
    values = [member.value for member in FACTORS[name]]
    return torch.tensor([values.index(factors(edit.after)[name]) for edit in edits])


def _unedited(edited: Edited) -> Tensor:
    """Where the exact renders before and after are the same, bool `[N H W]`."""
    return ((edited.before.int() - edited.after.int()).abs() < SAME).all(1)


def _share(values: Tensor) -> float | None:
    """The share of True, None of nothing."""
    return float(values.float().mean()) if len(values) else None
