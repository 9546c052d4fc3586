"""The debug executor's transport: every fit in this process, one after the other."""

import time
import traceback
from collections.abc import Iterable, Sequence

from fedhpc.federation import fit, grid_pb2
from fedhpc.federation.breakdown import SlotSeconds
from fedhpc.federation.transport import Request, Response


class InProcess:
    """A `Transport` that answers in the order of sending, with breakpoints working.

    Parameters
    ----------
    prepared : Prepared
        The run's ClientApp.
    """

    def __init__(self, prepared: fit.Prepared) -> None:
        import torch

        # As in a child; the result depends on it.
        torch.set_num_threads(prepared.config.isolation.threads_per_fit)
        self._prepared = prepared
        self._waiting: dict[str, Request] = {}

    def send(self, requests: Sequence[Request]) -> None:
        """Take requests; see `Transport`."""
        self._waiting.update({request.message_id: request for request in requests})

    def receive(self, message_ids: Iterable[str], timeout_s: float) -> list[Response]:  # noqa: ARG002
        """Run the next waiting fit; see `Transport`."""
        wanted = set(message_ids)
        for message_id, request in self._waiting.items():
            if message_id in wanted:
                del self._waiting[message_id]
                return [self._answer(request)]
        return []

    def clock_s(self) -> float:
        """Return a clock that runs with each fit; see `Transport`."""
        return time.monotonic()

    def slot_seconds(self) -> SlotSeconds:
        """Return zeros: there are no slots; see `Transport`."""
        return SlotSeconds()

    def withdraw(self, message_ids: Iterable[str]) -> list[Response]:
        """Forget requests; see `Transport`."""
        for message_id in message_ids:
            self._waiting.pop(message_id, None)
        return []

    def _answer(self, request: Request) -> Response:
        work = grid_pb2.Work(
            message_id=request.message_id,
            payload=request.packed.payload.SerializeToString(),
        )
        views = {blob.digest: memoryview(b"".join(blob.parts)) for blob in request.packed.blobs}
        start_s = time.monotonic()
        try:
            result, inline = fit.execute(self._prepared, work, views)
        except Exception as error:
            failure = grid_pb2.Failure(
                reason="".join(traceback.format_exception_only(error)).strip(),
                traceback=traceback.format_exc(),
                raised=True,
            )
            return Response(request.message_id, failure=failure, array_task=0)
        failed = result.HasField("failure")
        return Response(
            request.message_id,
            payload=None if failed else grid_pb2.Payload.FromString(result.payload),
            failure=result.failure if failed else None,
            blobs={blob.digest: memoryview(b"".join(blob.parts)) for blob in inline},
            files={blob.digest: blob.size for blob in result.blobs if blob.in_file},
            fit=grid_pb2.Fit(run_s=time.monotonic() - start_s),
            array_task=0,
        )
