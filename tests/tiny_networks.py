"""Words of train.py for networks so small that a stage takes seconds: what the end-to-end tests share."""

NETWORKS = (
    "data.resolution=32", "data.workers=0", "autoencoder.channels=[8]", "autoencoder.norm_groups=4",
    "backbone.channels=[16,16]", "backbone.norm_groups=4", "backbone.head_dim=16",
    "backbone.transformer_depth=[0,1]", "text_encoder.width=16", "text_encoder.layers=1",
    "text_encoder.heads=2", "text_encoder.context_length=12", "trainer.precision=fp32",
    "trainer.compile=off", "trainer.threads=1", "plan.autoencoder.batch_size=4",
    "plan.diffusion.batch_size=8", "sampling.num_steps=1",
)  # fmt: skip
#: Both stages, each with a checkpoint on the way.
PLAN = (
    "plan.autoencoder.images=32", "plan.autoencoder.checkpoint_every_images=16",
    "plan.autoencoder.log_every_images=8", "plan.diffusion.images=64",
    "plan.diffusion.checkpoint_every_images=32", "plan.diffusion.validate_every_images=32",
)  # fmt: skip
#: After those of `PLAN`: one step of each, of runs whose training is beside the point.
SHORT = ("plan.autoencoder.images=4", "plan.diffusion.images=8")
