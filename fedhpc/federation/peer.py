"""How the server treats its links, and what it knows of each array task that is connected."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from fedhpc.errors import PlatformError
from fedhpc.federation import grid_pb2
from fedhpc.federation.link import Piece, pieces
from fedhpc.federation.payload import BytesLike
from fedhpc.federation.transport import Response


@dataclass
class LinkOptions:
    """How the server treats its links.

    Attributes
    ----------
    run_id : str
        Peers of another run are refused.
    attempt : int
        Of this server.
    liveness_timeout_s : float
        Silence after which an array task counts as lost.
    inline_bytes : int
        The largest blob that goes over a link; larger ones are files.
    on_idle : callable
        Called about every second with the seconds since no work could start (0 while it can) and
        how many array tasks are connected; raises `PlatformError` when there is no point in
        waiting longer.
    """

    run_id: str
    attempt: int
    liveness_timeout_s: float
    inline_bytes: int
    on_idle: Callable[[float, int], None]


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
    turn_s : dict
        When the turn of each fit that it has came, by message.
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
    turn_s: dict[str, float] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    goodbye: str = ""
    dropped: asyncio.Future[str] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    _arriving: dict[str, bytearray] = field(default_factory=dict)
    _arrived: dict[str, memoryview] = field(default_factory=dict)

    async def gather(self) -> list[grid_pb2.ToArrayTask | None]:
        """Wait for something to write; return all that there is, up to the None at the end."""
        found = [await self.outgoing.get()]
        while found[-1] is not None and not self.outgoing.empty():
            found.append(self.outgoing.get_nowait())
        return found

    def events(
        self,
        waiting: Iterable[grid_pb2.ToArrayTask | None],
        is_wanted: Callable[[str], bool],
        parts: Callable[[str], Iterable[BytesLike]],
    ) -> Iterator[grid_pb2.ToArrayTask | Piece]:
        """Yield what is to be written, and before it the blobs that are not there yet.

        Parameters
        ----------
        waiting : iterable
            From `gather`.
        is_wanted : callable
            Returns whether a message still wants an answer.
        parts : callable
            Returns the bytes of the blob with this digest.
        """
        for event in waiting:
            if event is None:
                return
            if event.HasField("work"):
                if not is_wanted(event.work.message_id):
                    continue  # answered or withdrawn while the peer was slow
                for blob in event.work.blobs:
                    if blob.in_file or blob.digest in self.sent:
                        continue
                    yield from pieces(blob.digest, parts(blob.digest))
                    self.sent.add(blob.digest)
            yield event

    def take_chunk(self, chunk: grid_pb2.Chunk, limit: int) -> None:
        """Take a part of a result's blob of at most ``limit`` bytes."""
        # A result's blobs come before it, and at most the slots' results are under way.
        buffer = self._arriving.setdefault(chunk.digest, bytearray())
        if len(buffer) != chunk.offset or chunk.size > limit:
            raise PlatformError(
                f"a chunk of {chunk.digest[:12]} at {chunk.offset} of {chunk.size} bytes was not"
                f" expected after {len(buffer)} bytes"
            )
        data = chunk.data
        if len(data) == chunk.size:
            del self._arriving[chunk.digest]
            self._arrived[chunk.digest] = memoryview(data)
            return
        buffer += data
        if len(buffer) == chunk.size:
            self._arrived[chunk.digest] = memoryview(self._arriving.pop(chunk.digest))

    def response(self, result: grid_pb2.Result, held_s: float) -> Response:
        """Return the response in a result that was here for so long; its blobs are forgotten."""
        # Copies, as a part of a batch keeps all of it in memory, the arrays that came with it too.
        failure, fit = grid_pb2.Failure(), grid_pb2.Fit()
        failure.CopyFrom(result.failure)
        fit.CopyFrom(result.fit)
        failed = result.HasField("failure")
        digests = {blob.digest for blob in result.blobs if not blob.in_file}
        return Response(
            result.message_id,
            payload=None if failed else grid_pb2.Payload.FromString(result.payload),
            blobs={digest: self._arrived.pop(digest) for digest in digests},
            files={blob.digest: blob.size for blob in result.blobs if blob.in_file},
            failure=failure if failed else None,
            fit=fit if result.HasField("fit") else None,
            array_task=self.hello.array_task,
            host=self.hello.host,
            held_s=held_s,
        )


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
