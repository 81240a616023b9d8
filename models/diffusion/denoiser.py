"""The denoiser: backbone + schedule + parameterization as one function `(x_t, t, conditioning) -> x0_hat`.

Samplers, guidance, editing and distillation see only this, so none of them knows what the network predicts.
"""

from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.objective import Backbone
from models.diffusion.parameterizations import Parameterization
from models.diffusion.schedules import Schedule, expand


class Denoiser:
    """Predicts clean latents.

    Args:
        backbone: the network `F`.
        schedule: the one it was trained with.
        parameterization: the one it was trained with.
    """

    def __init__(self, backbone: Backbone, schedule: Schedule, parameterization: Parameterization) -> None:
        parameterization.check(schedule)
        self.backbone = backbone
        self.schedule = schedule
        self.parameterization = parameterization

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`x0_hat`, float32 `[B C h w]`, for noisy latents at times `t` `[B]`, `t > 0`."""
        at = self.schedule(t)
        x_in = expand(self.parameterization.c_in(at), x_t) * x_t
        c_noise = self.parameterization.c_noise(self.schedule.timestep(t), at)
        output = self.backbone(x_in, c_noise, conditioning).float()
        return self.parameterization.clean(x_t, output, at)
