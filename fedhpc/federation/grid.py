"""Flower's Grid over a `Transport`: a ServerApp talks to the clients through this."""

import mmap
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhpc.federation import compat, grid_pb2, message_ids, seeds
from fedhpc.federation.payload import ArrayCache, pack, unpack
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.states import ClientStates
from fedhpc.federation.transport import Request, Response, Transport
from fedhpc.paths import RunPaths

_SEQUENCES = 1_000_000  # messages of the same verb to a client in a round
_PAUSE_S = 3600.0  # how long one wait lasts where the app sets no timeout


@dataclass(frozen=True)
class _Open:
    message: Message
    server_round: int
    client_id: int


class HpcGrid(Grid):
    """The clients of a run: client k is Flower's node k + 1.

    Message ids derive from round, client, verb and a sequence number, and so does the seed of the
    fit that answers: whoever computes a result, and whenever, it is the same one.

    Parameters
    ----------
    transport : Transport
        Carries messages.
    recorder : Recorder
        Told of every fit.
    paths : RunPaths
        Of the run.
    num_clients : int
        How many there are.
    seed : int
        Of the run.
    states : ClientStates
        Of the clients.
    """

    def __init__(
        self,
        transport: Transport,
        recorder: Recorder,
        paths: RunPaths,
        *,
        num_clients: int,
        seed: int,
        states: ClientStates,
    ) -> None:
        self.recorder = recorder
        self.seed = seed
        self._transport = transport
        self._paths = paths
        self._num_clients = num_clients
        self._states = states
        self._run = compat.empty_run(paths.run_id)
        self._open: dict[str, _Open] = {}
        self._sequences: Counter[tuple[int, int, str]] = Counter()
        self._first_sequence = 0

    def capture(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return what a checkpoint must hold, and the names of the files that it refers to."""
        states, files = self._states.capture()
        # Those of rounds that are done are not needed any more, but for messages of no round.
        sequences = {key: n for key, n in self._sequences.items() if key[0] == 0}
        return {"states": states, "sequences": sequences}, files

    def restore(self, captured: dict[str, Any]) -> None:
        """Go on from what `capture` returned."""
        self._states.restore(captured["states"])
        self._sequences |= Counter(captured["sequences"])

    def begin_anew(self) -> None:
        """Let rounds begin at 1 once more, with message ids that have not been used."""
        self._first_sequence += _SEQUENCES
        self._sequences = Counter({key: n for key, n in self._sequences.items() if key[0] == 0})

    def set_run(self, run: compat.Run) -> None:
        """Set Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> compat.Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; see Flower's Grid."""
        return Message(
            content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id
        )

    def get_node_ids(self) -> list[int]:
        """Return the ids of all clients: 1 to ``num_clients``."""
        return list(range(1, self._num_clients + 1))

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages and return their ids.

        Raises
        ------
        ValueError
            If a message is for a node that is none of 1 to ``num_clients``.
        """
        cache = ArrayCache()
        requests = [self._request(message, cache) for message in messages]
        if requests:
            first = self._open[requests[0].message_id]
            verb = first.message.metadata.message_type
            self.recorder.sent(verb, first.server_round, len(requests))
            self._transport.send(requests)
        return [request.message_id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, without waiting."""
        wanted = [message_id for message_id in message_ids if message_id in self._open]
        return [self._accept(response) for response in self._transport.receive(wanted, 0.0)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return their replies, in the order of the clients.

        What is not answered within ``timeout`` seconds is cancelled and left out.
        """
        waiting = set(self.push_messages(messages))
        deadline_s = None if timeout is None else time.monotonic() + timeout
        replies: dict[tuple[int, str], Message] = {}
        while waiting:
            left_s = _PAUSE_S if deadline_s is None else deadline_s - time.monotonic()
            if left_s <= 0:
                break
            for response in self._transport.receive(waiting, left_s):
                waiting.discard(response.message_id)
                client_id = self._open[response.message_id].client_id
                replies[client_id, response.message_id] = self._accept(response)
        self._give_up(waiting)
        return [replies[key] for key in sorted(replies)]

    def _request(self, message: Message, cache: ArrayCache) -> Request:
        metadata = message.metadata
        client_id = metadata.dst_node_id - 1
        if not 0 <= client_id < self._num_clients:
            raise ValueError(
                f"a message is for node {metadata.dst_node_id}, expected 1 to {self._num_clients}"
            )
        server_round = _round_of(message)
        key = (server_round, client_id, metadata.message_type)
        sequence = self._first_sequence + self._sequences[key]
        self._sequences[key] += 1
        parts = message_ids.Parts(server_round, client_id, metadata.message_type, sequence)
        message_id = message_ids.make(parts)
        # Flower shares one content between a cohort's messages, but not the metadata.
        compat.set_message_id(message, message_id)
        packed = pack(message, self._states.get(client_id), cache)
        packed.payload.client_id = client_id
        packed.payload.seed = seeds.derive(self.seed, *key, sequence)
        self._open[message_id] = _Open(message, server_round, client_id)
        return Request(message_id, client_id, packed)

    def _accept(self, response: Response) -> Message:
        """Turn an answer into Flower's reply and commit the client's state."""
        opened = self._open.pop(response.message_id)
        verb = opened.message.metadata.message_type
        self.recorder.fit_ended(response, opened.server_round, opened.client_id, verb)
        if response.payload is None:
            failure = response.failure or grid_pb2.Failure(reason="no reply")
            return compat.make_error_reply(opened.message, failure.reason, raised=failure.raised)
        reply, state = unpack(response.payload, lambda digest: self._open_blob(response, digest))
        if reply.has_content():
            if response.payload.HasField("state"):
                self._states.put(opened.client_id, state)
            else:
                self._states.drop(opened.client_id)
        return reply

    def _open_blob(self, response: Response, digest: str) -> memoryview:
        if digest in response.blobs:
            return response.blobs[digest]
        path = self._paths.result_blob(response.message_id, digest)
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        response.blobs[digest] = data
        path.unlink()  # the mapping keeps the bytes
        return data

    def _give_up(self, message_ids: set[str]) -> None:
        if not message_ids:
            return
        self._transport.withdraw(message_ids)
        for message_id in sorted(message_ids):
            opened = self._open.pop(message_id)
            failure = grid_pb2.Failure(reason="no result before the round's deadline")
            self.recorder.fit_ended(
                Response(message_id, failure=failure),
                opened.server_round,
                opened.client_id,
                opened.message.metadata.message_type,
            )


def _round_of(message: Message) -> int:
    """Return the round a message belongs to, as Flower's strategies write it; 0 if it says none."""
    for record in message.content.config_records.values():
        found = record.get("server-round")
        if isinstance(found, int):
            return found
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0
