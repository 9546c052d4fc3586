"""What the doctor tries in a process of its own: ``python -m fedhpc.doctor.child imports|gpu``.

The answer is one JSON line on standard output.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

_MODULES = ("submitit", "grpc", "flwr.serverapp", "flwr.clientapp", "torch")
_SIZE = 256


def imports() -> dict[str, Any]:
    """Import what the jobs of a run import."""
    start_s = time.perf_counter()
    for name in _MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:
            return {"problem": f"import {name} raised {type(error).__name__}: {error}"}
    return {"seconds": time.perf_counter() - start_s}


def gpu() -> dict[str, Any]:
    """Compute something on the GPU that this process sees, as a fit would."""
    from fedhpc.errors import PlatformError
    from fedhpc.isolation import devices

    try:
        device = devices.device_of_this_child()
    except PlatformError as error:
        return {"problem": error.message, "hint": error.hint}
    import torch

    start_s = time.perf_counter()
    try:
        a, b = torch.ones(_SIZE, _SIZE, device=device), torch.eye(_SIZE, device=device)
        total = float((a @ b).sum())
    except RuntimeError as error:  # a GPU that this build has no code for, a broken driver
        first = str(error).partition("\n")[0]
        return {"problem": f"torch {torch.__version__} could not compute on it: {first}"}
    if total != _SIZE * _SIZE:
        return {"problem": f"a sum came out as {total}, expected {_SIZE * _SIZE}"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": devices._driver_version(),
        "seconds": time.perf_counter() - start_s,
    }


def main() -> None:
    """Do what the first argument names."""
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print is not the answer
    value = {"imports": imports, "gpu": gpu}[sys.argv[1]]()
    with os.fdopen(answer, "w") as file:
        json.dump(value, file)


if __name__ == "__main__":
    main()
