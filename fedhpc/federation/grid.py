"""Flower's Grid over a `Transport`: a ServerApp talks to the clients through this."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedhpc.federation import compat, grid_pb2, groups, message_ids, seeds, updates
from fedhpc.federation.breakdown import SlotSeconds
from fedhpc.federation.cohort import Answer, Cohort, Outcome, nothing
from fedhpc.federation.conventions import examples_of, round_of
from fedhpc.federation.estimates import Estimates
from fedhpc.federation.journal import AcceptedJournal, Entry
from fedhpc.federation.payload import Encodings, pack
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.replies import Replies
from fedhpc.federation.states import ClientStates
from fedhpc.federation.transport import Request, Response, Transport
from fedhpc.paths import RunPaths

logger = logging.getLogger(__name__)

# Of replies that nobody has used yet: where a cohort's would be more, they come as files.
_REPLIES_IN_MEMORY_BYTES = 1_000_000_000
_TOO_LATE = "no result before the round's deadline"
_STEP_S = 1.0  # of waiting: the transport's clock wants to be read
_LINES_EVERY_S = 0.5  # at most; to write them costs a tenth of what tiny fits cost here


@dataclass(frozen=True)
class Asked:
    """Messages that are under way: see `HpcGrid.ask`."""

    message_ids: list[str]
    cohort: Cohort
    before: Entry | None
    wanted: int | None
    timeout_s: float


@dataclass(frozen=True)
class _Open:
    message: Message
    server_round: int
    client_id: int
    request: Request


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
    inline_bytes : int
        Larger arrays of a reply come as files, and so do smaller ones where a cohort's replies
        would be more than 1 GB in this process.
    retry : int
        How often `send_and_receive` tries a failed fit again.
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
        inline_bytes: int,
        retry: int = 0,
    ) -> None:
        self.recorder = recorder
        self.seed = seed
        self._transport = transport
        self._num_clients = num_clients
        self._retry = retry
        self._inline_bytes = inline_bytes
        self.journal = AcceptedJournal(paths)
        self._states = states
        self._run = compat.empty_run(paths.run_id)
        self._open: dict[str, _Open] = {}
        self._replies = Replies(paths)
        self._sequences = message_ids.Sequences()
        self._estimates = Estimates()

    def slot_seconds(self) -> SlotSeconds:
        """Return what the slots of all array tasks have done so far."""
        return self._transport.slot_seconds()

    def capture(self) -> tuple[dict[str, Any], frozenset[str]]:
        """Return what a checkpoint must hold, and the names of the files that it refers to."""
        states, files = self._states.capture()
        return {"states": states, "sequences": self._sequences.capture()}, files

    def restore(self, captured: dict[str, Any]) -> None:
        """Go on from what `capture` returned."""
        self._states.restore(captured["states"])
        self._sequences.restore(captured["sequences"])

    def begin_anew(self) -> None:
        """Let rounds begin at 1 once more, with message ids that have not been used."""
        self._sequences.begin_anew()

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
        requests = self._requests(messages)
        self._send(requests)
        return [request.message_id for request in requests]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, without waiting."""
        wanted = [message_id for message_id in message_ids if message_id in self._open]
        replies = []
        for response in self._transport.receive(wanted, 0.0):
            told, answer = self._answer(response)
            self._note(told)
            del self._open[response.message_id]
            answer.commit()
            replies.append(answer.reply)
        self.recorder.write_fits()
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send messages and return their replies, in the order of the clients.

        Fits that fail are tried again. What is not answered within ``timeout`` seconds is cancelled
        and left out.
        """
        outcome = self.collect(self.ask(messages, timeout=timeout))
        outcome.commit()
        return outcome.replies

    def ask(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        wanted: int | None = None,
        compare_metrics: bool = False,
        journalled: bool = False,
        known: Encodings | None = None,
    ) -> Asked:
        """Send messages; `collect` waits for what becomes of them.

        Parameters
        ----------
        messages : iterable of Message
            See `send_and_receive`.
        timeout : float, optional
            In seconds of the transport's clock, from `collect` on: it stands while nobody works.
        wanted : int, optional
            How many successes are enough: the rest is cancelled then. All by default.
        compare_metrics : bool
            Whether replies must also have the same names of metrics as most others.
        journalled : bool
            Whether the journal says who is waited for, if the same was sent before a restart.
        known : Encodings, optional
            Blobs of records in the messages.
        """
        with self.recorder.watch.phase("send"):
            requests = self._requests(messages, known)
            asked = [request.message_id for request in requests]
            before = self.journal.read(asked) if journalled else None
            if before is not None:
                requests = [r for r in requests if r.message_id in before.accepted]
            cohort = Cohort(
                [request.message_id for request in requests],
                retry=self._retry,
                wanted=None if before else wanted,
                # Accepted ones alone would be another majority than the one they were part of.
                refuse=partial(updates.refused, compare_metrics=compare_metrics)
                if before is None
                else lambda _: [],
            )
            self._send(requests)
        return Asked(asked, cohort, before, wanted, math.inf if timeout is None else timeout)

    def collect(self, asked: Asked, *, keep: bool = False) -> Outcome:
        """Return what became of messages; no client's state is committed yet.

        Parameters
        ----------
        asked : Asked
            From `ask`.
        keep : bool
            Whether the arrays of the replies will be sent on, by `send_on`.
        """
        self._replies.forget_kept()
        self._replies.keep = keep
        with self.recorder.watch.phase("receive"):
            late = self._wait(asked.cohort, asked.timeout_s)
            outcome = asked.cohort.outcome(late)
            if (before := asked.before) is not None:
                failed = self._failed_before(before)
                outcome = before.complete(outcome, asked.message_ids, asked.wanted, failed)
            self._end(outcome)
        return outcome

    def send_on(self, messages: Iterable[Message], timeout: float) -> Outcome:
        """Send messages with arrays of the replies that were kept last, and collect the answers.

        These arrays are not read here: their files are what is sent.
        """
        return self.collect(self.ask(messages, timeout=timeout, known=self._replies.kept))

    # --- inside ---

    def _wait(self, cohort: Cohort, timeout_s: float) -> list[str]:
        """Receive until a cohort is closed or time is over; return what came after that."""
        count = len(cohort.waiting)
        came: dict[str, Response] = {}
        deadline_s = self._transport.clock_s() + timeout_s
        while not cohort.closed and (left_s := deadline_s - self._transport.clock_s()) > 0:
            batch = {}
            with self.recorder.watch.phase("clients"):
                responses = self._transport.receive(cohort.waiting, min(left_s, _STEP_S))
            for response in responses:
                told, answer = self._answer(response, cohort.tries(response.message_id))
                batch[answer.message_id] = answer
                came[answer.message_id] = told
            refused = cohort.take(batch.values())
            for name, answer in sorted(batch.items()):
                self._note(came[name], tries=answer.tries, late=cohort.is_late(name))
            self._note_refused(refused, came)
            self.recorder.write_fits(every_s=_LINES_EVERY_S)
            if not cohort.closed:
                self._transport.send([self._open[name].request for name in cohort.again()])
            self.recorder.decided(count - len(cohort.waiting))
        if not cohort.closed:
            self._note_refused(cohort.weed(), came)
        unanswered = cohort.waiting.difference(cohort.again())  # it is too late to send these
        if not unanswered:
            return []
        late = self._transport.withdraw(unanswered)
        for response in late:
            self._note(response, tries=cohort.tries(response.message_id), late=True)
            self._replies.remove(response)
        return [response.message_id for response in late]

    def _note_refused(self, errors: list[Answer], came: dict[str, Response]) -> None:
        for error in errors:
            failure = grid_pb2.Failure(reason=error.reason)
            told = replace(came[error.message_id], failure=failure, fit=None)
            self._note(told, tries=error.tries, refused=True)

    def _failed_before(self, before: Entry) -> list[Answer]:
        """Return the errors of a cohort whose accepted part alone was asked again."""
        errors = []
        for message_id, reason in before.failed.items():
            opened = self._open[message_id]
            reply = compat.make_error_reply(opened.message, reason, raised=True)
            errors.append(Answer(message_id, opened.client_id, opened.message, reply))
        return errors

    def _end(self, outcome: Outcome) -> None:
        """Forget the messages of a cohort, and tell what became of each client."""
        answers = [*outcome.accepted, *outcome.failed]
        reasons = {answer.message_id: answer.reason for answer in answers}
        for message_id in outcome.missed:
            failure = grid_pb2.Failure(reason=_TOO_LATE)
            self._note(Response(message_id, failure=failure))
            reasons[message_id] = _TOO_LATE
        self.recorder.write_fits()
        for message_id, reason in reasons.items():
            opened = self._open[message_id]
            verb = opened.message.metadata.message_type
            self.recorder.streaks.note(opened.client_id, verb, reason)
        for message_id in outcome.asked:
            del self._open[message_id]
        self.recorder.closed(late=outcome.late, cancelled=outcome.cancelled)

    def _requests(
        self, messages: Iterable[Message], known: Encodings | None = None
    ) -> list[Request]:
        encodings = known or Encodings()
        requests = []
        for message in messages:
            requests.append(self._request(message, encodings))
            if isinstance(messages, Iterator):  # what yields them may change their common content
                encodings.forget_contents()
        fair_bytes = _REPLIES_IN_MEMORY_BYTES // max(len(self._open), 1)
        for request in requests:
            request.packed.payload.inline_bytes = min(self._inline_bytes, fair_bytes)
        return requests

    def _send(self, requests: Sequence[Request]) -> None:
        if requests:
            first = self._open[requests[0].message_id]
            verb = first.message.metadata.message_type
            self.recorder.sent(verb, first.server_round, len(requests))
            self._transport.send(requests)

    def _request(self, message: Message, encodings: Encodings) -> Request:
        metadata = message.metadata
        client_id = metadata.dst_node_id - 1
        if not 0 <= client_id < self._num_clients:
            raise ValueError(
                f"a message is for node {metadata.dst_node_id}, expected 1 to {self._num_clients}"
            )
        server_round = round_of(message)
        key = (server_round, client_id, metadata.message_type)
        sequence = self._sequences.next(*key)
        parts = message_ids.Parts(server_round, client_id, metadata.message_type, sequence)
        message_id = message_ids.make(parts)
        # Flower shares one content between a cohort's messages, but not the metadata.
        compat.set_message_id(message, message_id)
        is_mean = metadata.message_type == groups.MESSAGE_TYPE
        packed = pack(message, None if is_mean else self._states.get(client_id), encodings)
        packed.payload.client_id = client_id
        packed.payload.seed = seeds.derive(self.seed, *key, sequence)
        expected = self._estimates.expected(metadata.message_type, client_id)
        request = Request(message_id, client_id, packed, expected, anywhere=is_mean)
        self._open[message_id] = _Open(message, server_round, client_id, request)
        return request

    def _answer(self, response: Response, tries: int = 1) -> tuple[Response, Answer]:
        """Turn a response into Flower's reply; return it with what is to be told of it."""
        opened = self._open[response.message_id]
        read = self._replies.read(response, opened.message)
        commit = partial(self._commit, opened.client_id, read.state) if read.is_whole else nothing
        if read.failure is None and response.fit is not None:
            self._estimates.note(
                opened.message.metadata.message_type,
                opened.client_id,
                response.fit.run_s,
                response.array_task or 0,
                examples_of(read.message),
            )
        answer = Answer(
            response.message_id,
            opened.client_id,
            opened.message,
            read.message,
            commit=commit,
            tries=tries,
            final=read.failure is not None and read.failure.final,
        )
        return replace(response, payload=None, blobs={}, failure=read.failure), answer

    def _commit(self, client_id: int, state: RecordDict | None) -> None:
        if state is None:
            self._states.drop(client_id)
        else:
            self._states.put(client_id, state)

    def _note(self, response: Response, **more: Any) -> None:
        """Tell of a fit that has ended."""
        opened = self._open[response.message_id]
        verb = opened.message.metadata.message_type
        self.recorder.fit_ended(response, opened.server_round, opened.client_id, verb, **more)
