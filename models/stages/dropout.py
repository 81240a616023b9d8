"""What is left out of the conditioning in training, so that guidance has its branches: one number, one draw.

With p = `conditioning_dropout` the caption is left out with probability p. Where the backbone takes a picture
too, one uniform u a sample decides both: the caption alone for u < p/2, both for p/2 <= u < p, the picture
alone for p <= u < 3p/2 (Brooks et al. 2023, arXiv 2211.09800, section 3.2.1, who take p = 0.1). Used by the
diffusion stage, and by `train.py` to refuse a number before anything is built.
"""

from torch import Tensor

from models.unet import UNet


def without_text(u: Tensor, dropout: float) -> Tensor:
    """Whether each sample is trained without its caption, bool [B], by uniform draws `u` [B]."""
    return u < dropout


def without_picture(u: Tensor, dropout: float) -> Tensor:
    """Whether each sample is trained without its picture, bool [B], by the same draws `u` [B]."""
    return (u >= dropout / 2) & (u < 1.5 * dropout)


def check_dropout(dropout: float, backbone: UNet) -> None:
    """Raises ValueError for a `conditioning_dropout` out of range, or whose shares do not fit into 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"conditioning_dropout is {dropout}, but must lie in [0, 1)")
    if backbone.image_conditioning and dropout > 2 / 3:
        raise ValueError(
            f"conditioning_dropout is {dropout}, but half of it each goes to caption, picture and both: give "
            "at most 2/3 with backbone.image_conditioning"
        )
