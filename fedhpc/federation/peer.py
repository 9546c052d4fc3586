"""One connected array task, as the server's end of its link knows it."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from fedhpc.errors import PlatformError
from fedhpc.federation import grid_pb2


@dataclass(eq=False)
class Peer:
    """One connected array task.

    Attributes
    ----------
    number : int
        Of the link; never used twice.
    hello : Hello
        How it introduced itself.
    slots : int
        Fits it runs at a time.
    outgoing : asyncio.Queue
        What to write; None ends the stream.
    sent : set of str
        Digests of the blobs that it has.
    waiting : list of str
        What its fits wait for, in words.
    goodbye : str
        Why it leaves, once it has said so.
    dropped : asyncio.Future
        Done with the reason when the link is to be closed.
    """

    number: int
    hello: grid_pb2.Hello
    slots: int
    outgoing: asyncio.Queue[grid_pb2.ToArrayTask | None] = field(default_factory=asyncio.Queue)
    sent: set[str] = field(default_factory=set)
    waiting: list[str] = field(default_factory=list)
    goodbye: str = ""
    dropped: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    _arriving: dict[str, bytearray] = field(default_factory=dict)
    _arrived: dict[str, memoryview] = field(default_factory=dict)

    async def gather(self) -> list[grid_pb2.ToArrayTask | None]:
        """Wait for something to write; return all that there is."""
        found = [await self.outgoing.get()]
        while not self.outgoing.empty():
            found.append(self.outgoing.get_nowait())
        return found

    def take_chunk(self, chunk: grid_pb2.Chunk, limit: int) -> None:
        """Take a part of a result's blob of at most ``limit`` bytes."""
        # A result's blobs come before it, and at most the slots' results are under way.
        buffer = self._arriving.setdefault(chunk.digest, bytearray())
        if len(buffer) != chunk.offset or chunk.size > limit:
            raise PlatformError(
                f"a chunk of {chunk.digest[:12]} at {chunk.offset} of {chunk.size} bytes was not"
                f" expected after {len(buffer)} bytes"
            )
        buffer += chunk.data
        if len(buffer) == chunk.size:
            self._arrived[chunk.digest] = memoryview(self._arriving.pop(chunk.digest))

    def take_blobs(self, result: grid_pb2.Result) -> dict[str, memoryview]:
        """Return the blobs of a result that came over the link, by digest, and forget them."""
        digests = {blob.digest for blob in result.blobs if not blob.in_file}
        return {digest: self._arrived.pop(digest) for digest in digests}


def clash(hello: grid_pb2.Hello, others: Iterable[grid_pb2.Hello]) -> str:
    """Return why an array task must not work beside the others on its node; "" if it may."""
    for other in others:
        if other.array_task == hello.array_task:
            continue  # this one before it was requeued or lost its stream
        shared = [gpu for gpu in hello.gpus if gpu in other.gpus and not gpu.isdigit()]
        # A UUID is one GPU of the world.
        if shared and other.lock_folder != hello.lock_folder:
            return (
                f"array tasks {other.array_task} and {hello.array_task} share GPU {shared[0]},"
                " but do not see the same folder of slot locks (a /tmp for each job?); name a"
                " folder of the node that both see with isolation.lock_dir"
            )
    return ""
