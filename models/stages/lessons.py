"""From a run's configuration and its base to what a student learns, and the refusal of what cannot be taught.

Used by `train.py`, which builds the distillation stage of the `Lesson`.
"""

from models.checkpoint import CheckpointError
from models.diffusion.distillation import Distillation, Lesson
from models.diffusion.objective import Objective
from models.loading import STUDENT_KEY, read_sampling
from models.registry import ConfigError
from models.sampling import Sampling, is_euler
from models.stages.base import Base
from models.unet import UNet


def check_student(
    backbone: UNet, sampling: Sampling, objective: Objective, distillation: Distillation, shards: int
) -> None:
    """Refuses to distil what cannot be, before anything is built.

    Args:
        backbone: of the student, and of its teacher.
        sampling: how the student is to make pictures.
        objective: of both.
        distillation: how it is taught.
        shards: ranks that each model is spread over.

    Raises:
        ConfigError: naming the options.
    """
    if backbone.image_conditioning:
        raise ConfigError("stage distillation cannot teach to edit; set backbone.image_conditioning=false")
    if sampling.guidance_scale != 1 or not is_euler(sampling.sampler):
        raise ConfigError(
            f"sampling.guidance_scale is {sampling.guidance_scale:g}, but a student takes plain steps "
            "with its guidance built in; set sampling.guidance_scale=1 and sampler=euler, and what is "
            "built in with distillation.guidance_scale"
        )
    if shards > 1:
        raise ConfigError("stage distillation has a whole model on each rank; use trainer.strategy=ddp")
    try:
        distillation.segments(sampling.grid, objective, sampling.num_steps)
    except ValueError as error:
        raise ConfigError(f"distillation: {error}") from None


def plan_lesson(base: Base, sampling: Sampling, objective: Objective, distillation: Distillation) -> Lesson:
    """What the student is to learn from `base`; the arguments are those of `check_student`.

    Raises:
        CheckpointError: the base is a student itself.
    """
    if STUDENT_KEY in base.config:
        raise CheckpointError(f"base={base.path} is a student itself; give the run that it learnt from")
    teacher, scale = read_sampling(base.config), distillation.guidance_scale
    scale = teacher.guidance_scale if scale is None else scale
    segments = distillation.segments(sampling.grid, objective, sampling.num_steps)
    return Lesson(objective, segments, teacher.guidance, scale)
