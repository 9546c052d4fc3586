"""Data, models and training in plain PyTorch: nothing of Flower's runtime, nothing of Slurm."""
