"""anyflow: turn a video diffusion model into one that samples at any number of steps."""

__version__ = "0.1.0"
