"""Federated learning with Flower and PyTorch on Slurm clusters."""

__version__ = "0.1.0"
