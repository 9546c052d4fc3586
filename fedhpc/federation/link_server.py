"""The server's end of the links: a gRPC service over `Dispatch`, in a thread of its own."""

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence, Set
from typing import Any, TypeVar

import grpc

from fedhpc.errors import PlatformError, Superseded
from fedhpc.federation import actions, dispatch, grid_pb2, link
from fedhpc.federation.blobs import BlobStore
from fedhpc.federation.breakdown import SlotLedger, SlotSeconds
from fedhpc.federation.peer import LinkOptions, Peer, clash
from fedhpc.federation.transport import Request, Response, WorkClock
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)
T = TypeVar("T")

_REJOIN_S = 3.0  # within it array tasks have seen the address of a new attempt

ToArrayTask = grid_pb2.ToArrayTask
_Events = Sequence[grid_pb2.FromArrayTask]
_Context = Any  # grpc.aio.ServicerContext; grpc ships no types


class LinkServer:
    """A `Transport` over the links of the array tasks.

    Parameters
    ----------
    machine : Dispatch
        Decides who runs what. It is touched by the server's thread alone.
    options : LinkOptions
        See there.
    paths : RunPaths
        Of the run, for blobs that are files.
    credentials : grpc.ServerCredentials
        Of this run.
    """

    def __init__(
        self,
        machine: dispatch.Dispatch,
        options: LinkOptions,
        paths: RunPaths,
        credentials: grpc.ServerCredentials,
    ) -> None:
        self._machine = machine
        self._options = options
        self._store = BlobStore(paths, options.inline_bytes)
        self._credentials = credentials
        self._peers: dict[int, Peer] = {}
        self._numbers = itertools.count(1)
        self._requests: dict[str, Request] = {}
        self._responses: dict[str, Response] = {}
        self._news = threading.Condition()
        self._known: dict[int, Peer] = {}  # by array task
        self._done: Counter[int] = Counter()
        self._failed: Counter[int] = Counter()
        self._lonely_since_s = time.monotonic()
        self._clock = WorkClock(self._lonely_since_s)
        self._ledger = SlotLedger(self._lonely_since_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="links", daemon=True)
        self._server: grpc.aio.Server | None = None
        self._ticker: asyncio.Task[None] | None = None

    # --- life ---

    def start(self, host: str) -> int:
        """Listen on a free port of ``host`` and return it."""
        self._thread.start()
        return self._await(self._listen(host))

    def finish(self, reason: str | None, timeout_s: float = 5.0) -> None:
        """Tell every array task to leave, wait for them up to ``timeout_s``, and stop.

        Without a reason nobody is told: the array tasks are to wait for the next attempt, and the
        files of the results that they hold stay.
        """
        if self._thread.is_alive():  # it may be told twice
            with contextlib.suppress(TimeoutError, RuntimeError):
                self._await(self._say_goodbye(reason, timeout_s), timeout_s + 5)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout_s)
        if reason is not None:
            with contextlib.suppress(OSError, Superseded):  # another server's, or nobody's
                self._store.remove_all()

    def array_tasks(self) -> list[dict[str, Any]]:
        """Return what is known of each array task that has ever come, for status.json."""
        return [
            {
                "array_task": index,
                "connected": peer.number in self._peers,
                "host": peer.hello.host,
                "job_id": peer.hello.job_id,
                "gpus": list(peer.hello.gpus),
                "slots": peer.slots,
                "running": self._machine.running_on(peer.number),
                "done": self._done[index],
                "failed": self._failed[index],
                "waiting": (peer.waiting if peer.number in self._peers else self._pinned_to(index)),
            }
            for index, peer in sorted(self._known.items())
        ]

    def _pinned_to(self, array_task: int) -> list[str]:
        """Return what waits for an array task that is gone, in words."""
        fits = self._machine.waiting_for(array_task)
        return [f"{fits} fits wait until it is back (federation.placement: pinned)"] if fits else []

    # --- Transport ---

    def send(self, requests: Sequence[Request]) -> None:
        """Take requests; see `Transport`."""
        stale = self._store.add({request.message_id: request.packed.blobs for request in requests})

        def submit() -> None:
            for peer in self._peers.values():
                if gone := sorted(peer.sent & set(stale)):
                    peer.sent -= set(gone)
                    peer.outgoing.put_nowait(ToArrayTask(release=grid_pb2.Release(digests=gone)))
            for request in requests:
                self._requests[request.message_id] = request
                fingerprint = request.packed.fingerprint
                client_id = None if request.anywhere else request.client_id
                self._machine.submit(request.message_id, client_id, fingerprint, request.expected)
            self._act()

        self._loop.call_soon_threadsafe(submit)

    def receive(self, message_ids: Iterable[str], timeout_s: float) -> list[Response]:
        """Return answers; see `Transport`."""
        # A large cohort's set is not copied for each result.
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        deadline_s = time.monotonic() + timeout_s
        while True:
            left_s = deadline_s - time.monotonic()
            with self._news:
                self._news.wait_for(lambda: wanted & self._responses.keys(), min(left_s, 1.0))
                if ready := wanted & self._responses.keys():
                    return [self._responses.pop(message_id) for message_id in ready]
            self._check_company()  # it may wait for Slurm: not while the event loop waits for us
            if left_s <= 0:
                return []

    def clock_s(self) -> float:
        """Return a clock that stands while no work can go on; see `Transport`."""
        return self._clock.read(time.monotonic(), at_work=self._at_work)

    def slot_seconds(self) -> SlotSeconds:
        """Return what slots have done so far; see `Transport`."""
        return self._ledger.read(time.monotonic())

    def withdraw(self, message_ids: Iterable[str]) -> list[Response]:
        """Forget requests; see `Transport`."""
        gone = list(message_ids)
        with self._news:
            late = [self._responses.pop(name) for name in gone if name in self._responses]

        def withdraw() -> None:
            for message_id in gone:
                self._machine.withdraw(message_id)
                self._forget(message_id)
                with self._news:
                    self._responses.pop(message_id, None)
            self._act()

        self._loop.call_soon_threadsafe(withdraw)
        return late

    @property
    def _at_work(self) -> bool:
        return bool(self._peers) and self._machine.started

    def _check_company(self) -> None:
        idle_s = 0.0 if self._at_work else time.monotonic() - self._lonely_since_s
        self._options.on_idle(idle_s, len(self._peers))

    # --- the event loop's side ---

    def _await(self, coroutine: Coroutine[Any, Any, T], timeout_s: float = 30.0) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout_s)

    async def _listen(self, host: str) -> int:
        self._server = grpc.aio.server(options=link.OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(
            self._connect,
            request_deserializer=grid_pb2.BatchFromArrayTask.FromString,
            response_serializer=grid_pb2.BatchToArrayTask.SerializeToString,
        )
        service, method = link.METHOD.strip("/").split("/")
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(service, {method: handler}),)
        )
        bracketed = f"[{host}]" if ":" in host else host
        try:
            port: int = self._server.add_secure_port(f"{bracketed}:0", self._credentials)
        except RuntimeError as error:
            raise PlatformError(
                f"cluster.interface: could not listen on {host}: {error}",
                "name an interface or address of the server's node",
            ) from error
        await self._server.start()
        if self._options.attempt > 1:
            self._machine.expect_back(time.monotonic() + _REJOIN_S)
            self._loop.call_later(_REJOIN_S, self._look)
        self._ticker = asyncio.create_task(self._tick())
        return port

    async def _say_goodbye(self, reason: str | None, timeout_s: float) -> None:
        if self._ticker is not None:
            self._ticker.cancel()
        if reason is not None:
            for peer in self._peers.values():
                peer.outgoing.put_nowait(ToArrayTask(finish=grid_pb2.Finish(reason=reason)))
                peer.outgoing.put_nowait(None)
            deadline_s = time.monotonic() + timeout_s
            while self._peers and time.monotonic() < deadline_s:
                await asyncio.sleep(0.01)
        if self._server is not None:
            await self._server.stop(grace=0)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._options.liveness_timeout_s / 5)
            self._look()
            for peer in self._peers.values():
                if peer.outgoing.empty():
                    peer.outgoing.put_nowait(ToArrayTask(heartbeat=grid_pb2.Heartbeat()))

    def _look(self) -> None:
        """Let the state machine see what time it is."""
        self._machine.tick(time.monotonic())
        self._act()

    async def _connect(
        self, requests: AsyncIterator[grid_pb2.BatchFromArrayTask], context: _Context
    ) -> None:
        """Serve one array task until either side is gone."""
        first = await anext(aiter(requests), None)
        if first is None or not (first.events and first.events[0].HasField("hello")):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected a Hello first")
            return
        hello = first.events[0].hello
        if hello.run_id != self._options.run_id:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"this is run {self._options.run_id}, not {hello.run_id}",
            )
        if problem := clash(hello, [peer.hello for peer in self._peers.values()]):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, problem)
        peer = Peer(next(self._numbers), hello, hello.slots)
        peer.outgoing.put_nowait(
            ToArrayTask(welcome=grid_pb2.Welcome(attempt=self._options.attempt))
        )
        self._peers[peer.number] = self._known[hello.array_task] = peer
        held = {fit.message_id: fit.fingerprint for fit in hello.held}
        self._machine.join(peer.number, hello.array_task, hello.slots, held, time.monotonic())
        logger.info(
            "array task %d (job %s) connected from %s with %d slots and %d fits from before",
            hello.array_task, hello.job_id, hello.host, hello.slots, len(held),
        )  # fmt: skip
        self._act()
        tasks: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._read(peer, requests, first.events[1:])),
            asyncio.ensure_future(self._write(peer, context)),
            peer.dropped,
        ]
        reason = "the array task left"
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if error := task.exception():
                    reason = f"{type(error).__name__}: {error}"
            if peer.dropped.done():
                reason = peer.dropped.result()
        finally:
            for task in tasks:
                task.cancel()
            del self._peers[peer.number]
            if not self._peers:
                self._lonely_since_s = time.monotonic()
            logger.info("array task %d is gone: %s", hello.array_task, peer.goodbye or reason)
            blame = not peer.goodbye
            self._machine.leave(peer.number, time.monotonic(), peer.goodbye or reason, blame=blame)
            self._act()
            for waits in self._pinned_to(hello.array_task):
                logger.warning("array task %d: %s", hello.array_task, waits)
        if peer.dropped.done() and not peer.dropped.cancelled():
            await context.abort(grpc.StatusCode.ABORTED, reason)

    async def _read(
        self, peer: Peer, requests: AsyncIterator[grid_pb2.BatchFromArrayTask], first: _Events
    ) -> None:
        self._take(peer, first)
        async for batch in requests:
            self._machine.heard(peer.number, time.monotonic())
            self._take(peer, batch.events)
            if peer.goodbye:
                return

    def _take(self, peer: Peer, events: _Events) -> None:
        """Note what an array task says, and do what is to be done then."""
        with self._news:  # whoever waits for results wakes up once
            for event in events:
                self._take_event(peer, event)
                if peer.goodbye:
                    return  # it is given nothing more
        if not all(event.HasField("chunk") for event in events):
            self._act()

    def _take_event(self, peer: Peer, event: grid_pb2.FromArrayTask) -> None:
        if event.HasField("chunk"):
            peer.take_chunk(event.chunk, max(self._options.inline_bytes, link.CHUNK))
        elif event.HasField("result"):
            self._take_result(peer, event.result)
        elif event.HasField("heartbeat"):
            peer.waiting = list(event.heartbeat.waiting)
        elif event.HasField("slots"):
            peer.slots = event.slots.slots
            self._machine.resize(peer.number, peer.slots)
        elif event.HasField("hand_back"):
            back = event.hand_back
            logger.warning("array task %d: %s", peer.hello.array_task, back.reason)
            peer.turn_s.pop(back.message_id, None)
            self._machine.hand_back(peer.number, back.message_id, back.reason)
        elif event.HasField("goodbye"):
            peer.goodbye = event.goodbye.reason

    async def _write(self, peer: Peer, context: _Context) -> None:
        while True:
            waiting = await peer.gather()
            events = peer.events(waiting, self._requests.__contains__, self._store.parts)
            for batch in link.batches(grid_pb2.BatchToArrayTask, events):
                await context.write(batch)
            if waiting[-1] is None:
                return

    def _take_result(self, peer: Peer, result: grid_pb2.Result) -> None:
        peer.outgoing.put_nowait(
            ToArrayTask(accepted=grid_pb2.Accepted(message_id=result.message_id))
        )
        now_s = time.monotonic()
        held_s = now_s - peer.turn_s.pop(result.message_id, now_s)
        response = peer.response(result, held_s)
        if self._machine.answered(peer.number, result.message_id):
            failed = response.failure is not None
            (self._failed if failed else self._done)[peer.hello.array_task] += 1
            self._respond(response)

    def _respond(self, response: Response) -> None:
        self._forget(response.message_id)
        with self._news:
            self._responses[response.message_id] = response
            self._news.notify_all()

    def _forget(self, message_id: str) -> None:
        self._requests.pop(message_id, None)
        self._store.drop(message_id)

    def _act(self) -> None:
        """Do what the state machine wants done."""
        for action in self._machine.actions():
            if isinstance(action, actions.Fail):
                failure = grid_pb2.Failure(reason=action.reason, final=True)
                self._respond(Response(action.message_id, failure=failure))
                continue
            peer = self._peers.get(action.link)
            if peer is None:
                continue
            if isinstance(action, actions.Turn):
                if action.message_id in self._requests:  # else the same batch has its result too
                    peer.turn_s[action.message_id] = time.monotonic()
            elif isinstance(action, actions.Assign):
                peer.outgoing.put_nowait(ToArrayTask(work=self._work(action.message_id)))
            elif isinstance(action, actions.Keep):
                keep = grid_pb2.Keep(message_id=action.message_id)
                peer.outgoing.put_nowait(ToArrayTask(keep=keep))
            elif isinstance(action, actions.Cancel):
                cancel = grid_pb2.Cancel(message_id=action.message_id)
                peer.outgoing.put_nowait(ToArrayTask(cancel=cancel))
                peer.turn_s.pop(action.message_id, None)
            elif not peer.dropped.done():
                peer.dropped.set_result(action.reason)
        slots, busy = self._machine.occupancy()
        asked = self._machine.has_messages
        self._ledger.note(time.monotonic(), slots=slots, busy=busy, asked=asked)

    def _work(self, message_id: str) -> grid_pb2.Work:
        packed = self._requests[message_id].packed
        return grid_pb2.Work(
            message_id=message_id,
            payload=packed.payload.SerializeToString(),
            blobs=[self._store.describe(blob) for blob in packed.blobs],
            fingerprint=packed.fingerprint,
        )
