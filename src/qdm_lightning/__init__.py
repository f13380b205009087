"""Low-bit quantized diffusion models: Q-DM on PyTorch Lightning and Hydra."""

__version__ = "0.1.0"
