"""A module that asks CUDA for its devices when it is imported."""

import gpu_device

gpu_device.count_devices()
