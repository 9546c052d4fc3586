"""The array task's end of the link: one outbound gRPC stream, so it needs no open port.

The server's end is `fedhpc.federation.link_server`. This module loads neither flwr nor torch: the
array task's own process stays small.
"""

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import grpc

from fedhpc.errors import LinkRefused, PlatformError
from fedhpc.federation import certificates, grid_pb2

METHOD = "/fedhpc.Link/Connect"
CHUNK = 2 * 1024 * 1024
# Arrays go in chunks; this bounds what an app puts into configs and metrics.
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", 512 * 1024 * 1024),
    ("grpc.max_send_message_length", 512 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),  # many sites set http_proxy, which knows no compute node
]

_GOODBYE_S = 1.0

B = TypeVar("B", grid_pb2.BatchFromArrayTask, grid_pb2.BatchToArrayTask)


class Piece(NamedTuple):
    """A part of a blob, on its way to be a `grid_pb2.Chunk`.

    Attributes
    ----------
    digest : str
        Of the blob.
    size, offset : int
        Bytes of the blob, and where in it this part begins.
    data : memoryview
        At most `CHUNK` bytes.
    """

    digest: str
    size: int
    offset: int
    data: memoryview


def pieces(digest: str, parts: Iterable[bytes | bytearray | memoryview]) -> Iterator[Piece]:
    """Split a blob's bytes into parts of at most `CHUNK` bytes."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    size = sum(map(len, views))
    offset = 0
    for view in views:
        for start in range(0, len(view), CHUNK):
            data = view[start : start + CHUNK]
            yield Piece(digest, size, offset, data)
            offset += len(data)


def batches(kind: type[B], events: Iterable[Any]) -> Iterator[B]:
    """Gather events into batches of about `CHUNK` bytes; one that is larger is a batch itself.

    Parameters
    ----------
    kind : type
        Of the batches.
    events : iterable
        Messages of the type that they hold, and `Piece`: those become chunks here, as protobuf
        copies a message whenever it is put into another one or asked for its size.
    """
    batch, size = kind(), 0
    for event in events:
        more = len(event.data) if isinstance(event, Piece) else event.ByteSize()
        if size and size + more > CHUNK:
            yield batch
            batch, size = kind(), 0
        if isinstance(event, Piece):
            chunk = batch.events.add().chunk
            chunk.digest, chunk.size, chunk.offset = event[:3]
            chunk.data = bytes(event.data)
        else:
            batch.events.append(event)
        size += more
    if batch.events:
        yield batch


Event = grid_pb2.FromArrayTask | Piece
# Messages, and the seconds that they may wait for more to go with them; None is the end.
_Outgoing = tuple[Iterator[Event] | None, float]


class LinkClient:
    """One connection to the server.

    Parameters
    ----------
    address : str
        "host:port".
    credentials : grpc.ChannelCredentials
        Of this run.
    hello : Hello
        Who we are.
    liveness_timeout_s : float
        Silence after which the server counts as lost.
    waiting : callable
        Returns what fits wait for that have no slot yet, in words; the server is told.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials,
        hello: grid_pb2.Hello,
        liveness_timeout_s: float,
        waiting: Callable[[], list[str]] = list,
    ) -> None:
        self.address = address
        self._waiting = waiting
        self._liveness_timeout_s = liveness_timeout_s
        self._outgoing: queue.SimpleQueue[_Outgoing] = queue.SimpleQueue()
        self._urgent = threading.Event()
        self._lingers = False
        self.send([grid_pb2.FromArrayTask(hello=hello)])
        self._channel = grpc.secure_channel(
            address,
            credentials,
            [*OPTIONS, ("grpc.ssl_target_name_override", certificates.SERVER_NAME)],
        )
        connect = self._channel.stream_stream(
            METHOD,
            request_serializer=grid_pb2.BatchFromArrayTask.SerializeToString,
            response_deserializer=grid_pb2.BatchToArrayTask.FromString,
        )
        self._heard_s = time.monotonic()
        self._closed = threading.Event()
        self._ended = threading.Event()
        self._call = connect(self._requests(), wait_for_ready=False)
        threading.Thread(target=self._keep_alive, name="heartbeat", daemon=True).start()

    def events(self) -> Iterator[grid_pb2.ToArrayTask]:
        """Yield what the server says.

        Raises
        ------
        PlatformError
            When the stream breaks, or the server is silent for too long; `LinkRefused` when the
            server does not want it.
        """
        try:
            for batch in self._call:
                self._heard_s = time.monotonic()
                yield from batch.events
        except grpc.RpcError as error:
            if self._closed.is_set():
                return
            silence_s = time.monotonic() - self._heard_s
            if silence_s > self._liveness_timeout_s:
                found = f"the server was silent for {silence_s:.0f} s"
            else:
                found = f"{error.code().name}: {error.details()}"
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
                raise LinkRefused(f"the server refuses: {error.details()}") from error
            raise PlatformError(f"link to the server at {self.address}: {found}") from error
        finally:
            self._ended.set()

    def send(self, events: Iterable[Event], *, within_s: float = 0.0) -> None:
        """Queue messages; they are made when the stream has room for them.

        Parameters
        ----------
        events : iterable of FromArrayTask or Piece
            The messages.
        within_s : float, default 0
            Where nobody waits for them: how many seconds they may wait for more to go with them,
            once the stream could take them. Of several, what the first one says counts.
        """
        self._lingers = self._lingers or within_s > 0
        self._outgoing.put((iter(events), within_s))
        if not within_s:
            self._urgent.set()

    def hurry(self) -> None:
        """Send what waits for more to go with it."""
        if self._lingers:
            self._urgent.set()

    def leave(self, reason: str) -> None:
        """Say goodbye, so that no fit is blamed for the end of the stream, and end it."""
        self.send([grid_pb2.FromArrayTask(goodbye=grid_pb2.Goodbye(reason=reason))])
        self._ended.wait(_GOODBYE_S)
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._closed.set()
        self._outgoing.put((None, 0.0))
        self._urgent.set()
        self._call.cancel()
        self._channel.close()

    def _requests(self) -> Iterator[grid_pb2.BatchFromArrayTask]:
        while True:
            waiting = self._gather()
            events = itertools.chain.from_iterable(one for one in waiting if one)
            yield from batches(grid_pb2.BatchFromArrayTask, events)
            if waiting[-1] is None:
                return

    def _gather(self) -> list[Iterator[Event] | None]:
        """Wait for messages; return all that there are, up to the None at the end."""
        events, within_s = self._outgoing.get()
        found = [events]
        self._urgent.wait(within_s)  # one wait, as each that comes meanwhile would wake it
        self._lingers = False
        self._urgent.clear()  # before what is urgent is taken: it is set when that is there
        with contextlib.suppress(queue.Empty):
            while found[-1] is not None:
                found.append(self._outgoing.get_nowait()[0])
        return found

    def _keep_alive(self) -> None:
        looked_s = time.monotonic()
        while not self._closed.wait(self._liveness_timeout_s / 5):
            now_s = time.monotonic()
            if now_s - looked_s > self._liveness_timeout_s / 2:
                # We were stalled ourselves, and read nothing meanwhile: that is not the server's.
                self._heard_s = min(self._heard_s + now_s - looked_s, now_s)
            looked_s = now_s
            beat = grid_pb2.Heartbeat(waiting=self._waiting())
            self.send([grid_pb2.FromArrayTask(heartbeat=beat)])
            if now_s - self._heard_s > self._liveness_timeout_s:
                self._call.cancel()
                return
