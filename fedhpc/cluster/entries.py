"""What the jobs call: a function by its name, so that submitting loads neither flwr nor grpc."""

import importlib
import os
from typing import Any

JOB_ENV = {"PYTHONHASHSEED": "0"}  # the order of sets in strategies is the same in every run
SERVER = "fedhpc.server:run"
CLIENT = "fedhpc.client:run"


def call(reference: str, *arguments: Any) -> None:
    """Import ``module:function`` and call it."""
    module, _, name = reference.partition(":")
    getattr(importlib.import_module(module), name)(*arguments)


def call_with_gpus(gpus: str | None, reference: str, *arguments: Any) -> None:
    """Call a function with the GPUs that submit saw; submitit's LocalExecutor hides them all."""
    if gpus is None:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    call(reference, *arguments)
