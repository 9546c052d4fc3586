"""A federation that only talks, to load the server alone: an app, and array tasks that echo.

`scale.py` runs it. The server is fedhpc's own, with its links, cohorts, checkpoints and records;
each array task is a link of its own (connection, TLS, protocol), all in one process, and answers
work with the arrays that it was sent. So a thousand array tasks fit on a small machine.
"""

import asyncio
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedhpc.federation import certificates, compat, grid_pb2, link
from fedhpc.files import read_json, wait_until
from fedhpc.paths import RunPaths

server = ServerApp()
client = ClientApp()
_TOGETHER = 32  # links that connect at the same time


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average zeros."""
    settings = context.run_config
    clients, cohort = len(list(grid.get_node_ids())), int(settings["cohort"])
    strategy = FedAvg(
        fraction_train=cohort / clients,
        fraction_evaluate=0.0,
        min_train_nodes=cohort,
        min_available_nodes=clients,
    )
    zeros = np.zeros(int(settings["numbers"]), np.float32)
    arrays = ArrayRecord({"zeros": Array(zeros)})
    strategy.start(grid, arrays, num_rounds=int(settings["rounds"]))


@client.train()
def train(message: Message, _context: Context) -> Message:
    """Return what was sent."""
    return Message(_reply(message.content.array_records["arrays"]), reply_to=message)


def _reply(arrays: ArrayRecord) -> RecordDict:
    return RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})


class Echo:
    """Array tasks without fits.

    Attributes
    ----------
    sent, received : int
        Bytes of the protocol's messages, without those of TLS and HTTP/2.
    """

    def __init__(self, paths: RunPaths, links: int, slots: int) -> None:
        self._paths = paths
        self._links = links
        self._slots = slots
        self._gate = asyncio.Semaphore(_TOGETHER)
        self.sent = self.received = 0

    async def run(self, address: str) -> None:
        """Serve until the run ends."""
        compat.set_identity(self._paths.run_id)
        await asyncio.gather(*(self._link(address, number) for number in range(self._links)))

    async def _link(self, address: str, number: int) -> None:
        options = [
            *link.OPTIONS,
            ("grpc.ssl_target_name_override", certificates.SERVER_NAME),
            ("grpc.use_local_subchannel_pool", 1),  # a connection for each
        ]
        credentials = certificates.client_credentials(self._paths.secrets)
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            call = channel.stream_stream(
                link.METHOD,
                request_serializer=grid_pb2.BatchFromArrayTask.SerializeToString,
                response_deserializer=grid_pb2.BatchToArrayTask.FromString,
            )()
            hello = grid_pb2.Hello(
                run_id=self._paths.run_id, array_task=number, slots=self._slots, host="echo"
            )
            async with self._gate:
                await self._write(call, [grid_pb2.FromArrayTask(hello=hello)])
            turn = asyncio.Lock()  # gRPC takes one write at a time
            beat = asyncio.create_task(self._keep_alive(call, turn))
            blobs: dict[str, bytearray] = {}
            try:
                while True:
                    batch = await call.read()
                    if batch is grpc.aio.EOF:
                        return
                    self.received += batch.ByteSize()
                    answers: list[link.Event] = []
                    for event in batch.events:
                        if event.HasField("finish"):
                            return
                        if event.HasField("chunk"):
                            blob = blobs.setdefault(event.chunk.digest, bytearray())
                            blob.extend(event.chunk.data)
                        elif event.HasField("release"):
                            for digest in event.release.digests:
                                blobs.pop(digest, None)
                        elif event.HasField("work"):
                            answers += self._answers(event.work, blobs)
                    async with turn:
                        await self._write(call, answers)
            finally:
                beat.cancel()

    def _answers(self, work: grid_pb2.Work, blobs: dict[str, bytearray]) -> Iterator[link.Event]:
        asked = grid_pb2.Payload.FromString(work.payload)
        message = compat.message_from_bytes(asked.message)
        (arrays,) = asked.arrays
        reply = Message(_reply(message.content.array_records[arrays.record]), reply_to=message)
        content = compat.content_to_bytes(reply.content)
        payload = grid_pb2.Payload(message=compat.message_to_bytes(reply, content))
        payload.arrays.add(record="arrays", digest=arrays.digest)
        result = grid_pb2.Result(
            message_id=work.message_id,
            payload=payload.SerializeToString(),
            blobs=work.blobs,
            fit=grid_pb2.Fit(),
        )
        (blob,) = work.blobs
        if blob.in_file:
            (path := self._paths.result_blob(work.message_id, blob.digest)).unlink(missing_ok=True)
            path.hardlink_to(self._paths.blob(blob.digest))
        else:
            yield from link.pieces(blob.digest, [blobs[blob.digest]])
        yield grid_pb2.FromArrayTask(result=result)

    async def _write(self, call: grpc.aio.StreamStreamCall, events: Iterable[link.Event]) -> None:
        for batch in link.batches(grid_pb2.BatchFromArrayTask, events):
            self.sent += batch.ByteSize()
            await call.write(batch)

    async def _keep_alive(self, call: grpc.aio.StreamStreamCall, turn: asyncio.Lock) -> None:
        while True:
            await asyncio.sleep(3)
            async with turn:
                await self._write(call, [grid_pb2.FromArrayTask(heartbeat=grid_pb2.Heartbeat())])


def run(run_dir: Path, links: int, slots: int) -> None:
    """Serve a run's server; print the bytes that went over the links."""
    paths = RunPaths(run_dir)
    if not wait_until(lambda: read_json(paths.rendezvous) is not None, 60):
        sys.exit(f"no server within 60 s: {paths.rendezvous} does not exist")
    echo = Echo(paths, links, slots)
    start_s = time.process_time()
    asyncio.run(echo.run(read_json(paths.rendezvous)["address"]))
    cpu_s = time.process_time() - start_s
    print(json.dumps({"sent": echo.sent, "received": echo.received, "cpu_s": cpu_s}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
