"""The mathematics of diffusion; knows no network."""
