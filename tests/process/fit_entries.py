"""What stands in for `fedhpc.federation.fit` in the children of test_fits: no Flower, no torch.

The client's number says what its fit does.
"""

import os
import time
from pathlib import Path

from fedhpc.federation import grid_pb2, message_ids
from fedhpc.isolation import cuda

GB = 10**9
PEAK = 3 * GB  # what torch has of the simulated GPU


def run(work: memoryview) -> list[list[bytes]]:
    request = grid_pb2.Work.FromString(bytes(work))
    client = message_ids.read(request.message_id).client_id
    cuda.held_bytes = lambda: (PEAK, PEAK)
    with (Path(os.environ["FEDHPC_TEST_FOLDER"]) / "stamps").open("a") as file:
        file.write(f"{time.monotonic()} + {client}\n")
        file.flush()
        time.sleep(0.3)
        file.write(f"{time.monotonic()} - {client}\n")
    return [[grid_pb2.Result(message_id=request.message_id).SerializeToString()]]
