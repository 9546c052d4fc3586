"""The gRPC links: who is let in, and that nobody can hold up the others."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import grpc
import pytest

from fedhpc.config import Cluster
from fedhpc.errors import LinkRefused, PlatformError
from fedhpc.federation import certificates, compat, grid_pb2, issuer, link
from fedhpc.federation.dispatch import Dispatch
from fedhpc.federation.link import LinkClient
from fedhpc.federation.link_server import LinkServer
from fedhpc.federation.payload import Blob, Packed
from fedhpc.federation.peer import LinkOptions
from fedhpc.federation.transport import Request
from fedhpc.oversight import ClientArray
from fedhpc.paths import RunPaths

SLOTS = 2
LIVENESS_S = 1.0


class Service:
    """A link server with its certificates."""

    def __init__(
        self, folder: Path, placement: Literal["any", "pinned"] = "any", **options: Any
    ) -> None:
        self.paths = RunPaths(folder / "run")
        self.paths.blobs.mkdir(parents=True)
        issuer.create(self.paths.secrets)
        compat.set_identity("run")
        settings = {"liveness_timeout_s": LIVENESS_S, "on_idle": lambda *_: None, **options}
        self.links = LinkServer(
            Dispatch(
                array_tasks=2,
                placement=placement,
                liveness_timeout_s=settings["liveness_timeout_s"],
            ),
            LinkOptions("run", 1, inline_bytes=10_000_000, **settings),
            self.paths,
            certificates.server_credentials(self.paths.secrets),
        )
        self.port = self.links.start("127.0.0.1")
        self.address = f"127.0.0.1:{self.port}"

    def client(self, array_task: int = 0, **more: object) -> "Peer":
        hello = grid_pb2.Hello(run_id="run", array_task=array_task, slots=SLOTS)
        hello.MergeFrom(grid_pb2.Hello(**more))
        credentials = certificates.client_credentials(self.paths.secrets)
        return Peer(LinkClient(self.address, credentials, hello, 3 * LIVENESS_S))

    def send(self, *message_ids: str, blob: Blob | None = None, seed: int = 0) -> None:
        packed = Packed(grid_pb2.Payload(message=b"work", seed=seed), [blob] if blob else [])
        self.links.send([Request(message_id, 0, packed) for message_id in message_ids])


class Peer:
    """An array task by hand: events arrive in a queue."""

    def __init__(self, client: LinkClient) -> None:
        self.client = client
        self.events: queue.Queue[grid_pb2.ToArrayTask | Exception] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for event in self.client.events():
                self.events.put(event)
        except PlatformError as error:
            self.events.put(error)

    def next(self, kind: str, timeout_s: float = 10.0) -> grid_pb2.ToArrayTask:
        """Return the next event of a kind; those before it are passed over."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            event = self.events.get(timeout=max(0.01, deadline_s - time.monotonic()))
            if isinstance(event, Exception):
                raise event
            if event.HasField(kind):
                return event

    def next_of(self, *kinds: str) -> tuple[str, str]:
        """Return the kind and the message of the next event of some kinds."""
        while True:
            event = self.events.get(timeout=10)
            if isinstance(event, Exception):
                raise event
            if (kind := event.WhichOneof("event")) in kinds:
                return kind, getattr(event, kind).message_id

    def answer(self, message_id: str, payload: bytes = b"") -> None:
        result = grid_pb2.Result(message_id=message_id, payload=payload)
        self.client.send([grid_pb2.FromArrayTask(result=result)])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    service = Service(tmp_path)
    yield service
    service.links.finish("test over")


def batch_of(**event: Any) -> grid_pb2.BatchFromArrayTask:
    return grid_pb2.BatchFromArrayTask(events=[grid_pb2.FromArrayTask(**event)])


def _try_to_connect(channel: grpc.Channel) -> grpc.StatusCode:
    connect = channel.stream_stream(
        link.METHOD,
        request_serializer=grid_pb2.BatchFromArrayTask.SerializeToString,
        response_deserializer=grid_pb2.BatchToArrayTask.FromString,
    )
    hello = batch_of(hello=grid_pb2.Hello(run_id="run", slots=1))
    with pytest.raises(grpc.RpcError) as caught:
        next(connect(iter([hello]), timeout=10))
    code: grpc.StatusCode = caught.value.code()
    return code


NAME = [("grpc.ssl_target_name_override", certificates.SERVER_NAME)]


def test_a_peer_without_a_certificate_is_refused(service: Service) -> None:
    ca = (service.paths.secrets / "ca.crt").read_bytes()
    with grpc.secure_channel(service.address, grpc.ssl_channel_credentials(ca), NAME) as channel:
        assert _try_to_connect(channel) is grpc.StatusCode.UNAVAILABLE


def test_a_peer_with_the_certificate_of_another_run_is_refused(
    service: Service, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    issuer.create(other)
    key, certificate = ((other / name).read_bytes() for name in ("client.key", "client.crt"))
    ca = (service.paths.secrets / "ca.crt").read_bytes()  # it even trusts our server
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    with grpc.secure_channel(service.address, credentials, NAME) as channel:
        assert _try_to_connect(channel) is grpc.StatusCode.UNAVAILABLE


def test_a_peer_without_tls_is_refused(service: Service) -> None:
    with grpc.insecure_channel(service.address) as channel:
        assert _try_to_connect(channel) is grpc.StatusCode.UNAVAILABLE


def test_an_array_task_refuses_a_server_of_another_run(service: Service, tmp_path: Path) -> None:
    other = tmp_path / "other"
    issuer.create(other)
    hello = grid_pb2.Hello(run_id="run", slots=1)
    client = LinkClient(service.address, certificates.client_credentials(other), hello, 10.0)
    with pytest.raises(PlatformError, match="UNAVAILABLE"):
        list(client.events())
    client.close()


def listening() -> set[int]:
    """Return the ports that this process listens on."""
    tables = [Path("/proc/self/net") / name for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    inodes = {row[9]: int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A"}
    mine = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            mine |= {inodes[inode] for inode in inodes if target == f"socket:[{inode}]"}
    return mine


def test_no_socket_but_the_links_listens(tmp_path: Path) -> None:
    before = listening()
    service = Service(tmp_path)
    assert listening() - before == {service.port}
    service.links.finish("over")


def test_a_peer_of_another_run_id_is_told_so(service: Service) -> None:
    peer = service.client(run_id="another")
    with pytest.raises(PlatformError, match="this is run run, not another"):
        peer.next("welcome")


def test_work_goes_out_and_the_result_comes_back_once(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    service.send("a")
    assert peer.next("work").work.message_id == "a"
    payload = grid_pb2.Payload(message=b"reply").SerializeToString()
    peer.answer("a", payload)
    (response,) = service.links.receive(["a"], 5)
    assert response.payload is not None
    assert response.payload.message == b"reply"
    assert peer.next("accepted").accepted.message_id == "a"
    peer.answer("a", payload)  # again: accepted politely, not answered again
    assert peer.next("accepted").accepted.message_id == "a"
    assert service.links.receive(["a"], 0.2) == []


def test_the_common_arrays_are_sent_once_and_released_when_others_come(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    blob = Blob("d1", 5_000_000, [b"x" * 5_000_000])
    service.send("a", "b", blob=blob)
    received = 0
    while True:
        event = peer.events.get(timeout=10)
        assert not isinstance(event, Exception)
        if event.HasField("chunk"):
            assert event.chunk.offset == received
            received += len(event.chunk.data)
        elif event.HasField("work") and event.work.message_id == "b":
            break
    assert received == blob.size
    peer.answer("a")
    peer.answer("b")
    while len(service.links.receive(["a", "b"], 5)) == 0:
        pass
    time.sleep(0.2)
    service.send("c", blob=Blob("d2", 3, [b"abc"]))
    assert peer.next("release").release.digests == ["d1"]


def test_a_peer_that_reads_nothing_stalls_nobody_and_is_dropped(service: Service) -> None:
    stalled = socket.create_connection(("127.0.0.1", service.port))  # never even says hello
    silent = _SilentPeer(service)
    healthy = service.client(array_task=1)
    healthy.next("welcome")
    messages = [f"m{number}" for number in range(6)]
    service.send(*messages, blob=Blob("big", 9_000_000, [b"y" * 9_000_000]))
    answered: set[str] = set()
    deadline_s = time.monotonic() + 10 * LIVENESS_S
    while len(answered) < len(messages):
        assert time.monotonic() < deadline_s, answered
        message_id = healthy.next("work").work.message_id
        healthy.answer(message_id)
        answered.add(message_id)
    assert answered == set(messages)
    silent.close()
    stalled.close()


class _SilentPeer:
    """Connects, and then neither reads nor beats."""

    def __init__(self, service: Service) -> None:
        credentials = certificates.client_credentials(service.paths.secrets)
        self._channel = grpc.secure_channel(service.address, credentials, NAME)
        connect = self._channel.stream_stream(
            link.METHOD,
            request_serializer=grid_pb2.BatchFromArrayTask.SerializeToString,
            response_deserializer=grid_pb2.BatchToArrayTask.FromString,
        )
        hello = grid_pb2.Hello(run_id="run", array_task=0, slots=SLOTS)
        self._ended = threading.Event()

        def requests() -> Iterator[grid_pb2.BatchFromArrayTask]:
            yield batch_of(hello=hello)
            self._ended.wait(60)

        self._call = connect(requests())
        next(self._call)  # the welcome

    def close(self) -> None:
        self._ended.set()
        self._call.cancel()
        self._channel.close()


def test_array_tasks_that_share_a_gpu_but_no_locks_are_refused_and_told_so(
    service: Service,
) -> None:
    first = service.client(gpus=["GPU-a"], lock_folder="1:1")
    first.next("welcome")
    second = service.client(array_task=1, gpus=["GPU-a"], lock_folder="2:2")
    with pytest.raises(LinkRefused, match=r"share GPU GPU-a.*isolation\.lock_dir"):
        second.next("welcome")
    service.client(array_task=1, gpus=["GPU-a"], lock_folder="1:1").next("welcome")


def test_an_array_task_does_not_clash_with_itself_before_it_was_requeued(service: Service) -> None:
    service.client(gpus=["GPU-a"], lock_folder="1:1").next("welcome")
    service.client(gpus=["GPU-a"], lock_folder="2:2").next("welcome")


def test_a_lost_array_tasks_fits_go_to_another_at_once(service: Service) -> None:
    first = service.client(array_task=0)
    first.next("welcome")
    service.send("a", "b")
    assert {first.next("work").work.message_id for _ in range(2)} == {"a", "b"}
    second = service.client(array_task=1)
    second.next("welcome")
    lost_s = time.monotonic()
    first.client.close()
    assert {second.next("work").work.message_id for _ in range(2)} == {"a", "b"}
    assert time.monotonic() - lost_s < LIVENESS_S


def test_a_message_whose_array_tasks_all_said_goodbye_is_not_failed(service: Service) -> None:
    """A node that is preempted again and again is not the fault of the fits on it."""
    service.send("m")
    for _ in range(4):  # one more than a message may be lost
        peer = service.client()
        assert peer.next("work").work.message_id == "m"
        start_s = time.monotonic()
        peer.client.leave("SIGTERM")
        assert time.monotonic() - start_s < 1.0  # the server has heard it
    peer = service.client()
    peer.next("work")
    peer.answer("m", b"")
    (response,) = service.links.receive(["m"], 10)
    assert response.failure is None


def test_an_array_task_that_comes_back_keeps_what_it_holds(service: Service) -> None:
    first = service.client()
    first.next("welcome")
    service.send("a")
    fingerprint = first.next("work").work.fingerprint
    first.client.close()
    again = service.client(held=[grid_pb2.Held(message_id="a", fingerprint=fingerprint)])
    assert again.next("keep").keep.message_id == "a"
    again.answer("a")
    assert [response.message_id for response in service.links.receive(["a"], 5)] == ["a"]


def test_what_nobody_waits_for_travels_with_what_is_urgent(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: queue.Queue[int] = queue.Queue()
    take = service.links._take

    def note(peer: Any, events: Any) -> None:
        take(peer, events)
        if any(event.HasField("slots") for event in events):
            took.put(len(events))

    monkeypatch.setattr(service.links, "_take", note)
    peer = service.client()
    peer.next("welcome")
    slots = [grid_pb2.FromArrayTask(slots=grid_pb2.Slots(slots=SLOTS))]
    began_s = time.monotonic()
    for _ in range(3):
        peer.client.send(slots, within_s=5.0)
        time.sleep(0.05)
    assert took.empty()
    peer.client.send(slots)
    assert took.get(timeout=4) == 4
    assert time.monotonic() - began_s < 4
    peer.client.send(slots, within_s=0.1)
    assert took.get(timeout=4) == 1
    peer.client.send(slots, within_s=60.0)
    time.sleep(0.05)
    assert took.empty()
    peer.client.hurry()
    assert took.get(timeout=4) == 1


@pytest.mark.parametrize("size", [1, link.CHUNK, 2 * link.CHUNK + 3])
def test_a_result_comes_with_its_arrays_whatever_their_size(service: Service, size: int) -> None:
    peer = service.client()
    peer.next("welcome")
    service.send("a")
    peer.next("work")
    data = bytes(n % 251 for n in range(1000)) * (size // 1000 + 1)
    blobs = [grid_pb2.Blob(digest=name, size=size) for name in ("d1", "d2")]
    pieces = [piece for name in ("d1", "d2") for piece in link.pieces(name, [data[:size]])]
    result = grid_pb2.Result(message_id="a", blobs=blobs)
    peer.client.send([*pieces, grid_pb2.FromArrayTask(result=result)])
    peer.next("accepted")
    (response,) = service.links.receive(["a"], 5)
    assert {name: bytes(view) for name, view in response.blobs.items()} == {
        "d1": data[:size], "d2": data[:size],
    }  # fmt: skip


def test_results_that_come_together_leave_nothing_behind(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    messages = [f"m{n}" for n in range(2 * SLOTS)]  # as many are ahead of their turn as have it
    service.send(*messages)
    for _ in messages:
        peer.next("work")
    results = [grid_pb2.Result(message_id=name) for name in messages]
    peer.client.send([grid_pb2.FromArrayTask(result=result) for result in results])
    for _ in messages:
        peer.next("accepted")
    assert len(service.links.receive(messages, 5)) == len(messages)
    (known,) = service.links._peers.values()
    assert known.turn_s == {}


def test_what_is_handed_back_leaves_nothing_behind(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    service.send("a", "b")
    for _ in range(2):
        peer.next("work")
    (known,) = service.links._peers.values()
    assert set(known.turn_s) == {"a", "b"}
    other = service.client(1)
    other.next("welcome")
    back = grid_pb2.HandBack(message_id="a", reason="its input is gone")
    peer.client.send([grid_pb2.FromArrayTask(hand_back=back)])
    assert other.next("work").work.message_id == "a"
    assert set(known.turn_s) == {"b"}


def test_what_a_server_asks_after_it_came_back_is_kept_only_if_it_is_the_same(
    service: Service,
) -> None:
    messages = ["r00003-c000000-train-0", "r00003-c000001-train-0", "r00002-c000002-train-0"]
    fingerprint = Packed(grid_pb2.Payload(message=b"work"), []).fingerprint
    held = [grid_pb2.Held(message_id=each, fingerprint=fingerprint) for each in messages]
    peer = service.client(held=held)
    peer.next("welcome")
    service.send(messages[0])
    kinds = [(peer.next_of("keep", "cancel", "work")) for _ in range(2)]
    assert kinds == [("keep", messages[0]), ("cancel", messages[2])]
    service.send(messages[1], seed=5)
    kinds = [(peer.next_of("keep", "cancel", "work")) for _ in range(2)]
    assert kinds == [("cancel", messages[1]), ("work", messages[1])]
    for message_id in messages[:2]:
        peer.answer(message_id)
        assert service.links.receive([message_id], 5)


@pytest.mark.parametrize("goes_on", [True, False])
def test_the_files_of_results_stay_where_the_run_goes_on(tmp_path: Path, goes_on: bool) -> None:
    service = Service(tmp_path)
    file = service.paths.result_blob("r00001-c000001-train-0", "d")
    file.write_bytes(b"x")
    service.links.finish(None if goes_on else "finished")
    assert file.exists() == goes_on


def test_fits_that_wait_for_a_pinned_array_task_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(tmp_path, placement="pinned")
    first, second = service.client(0), service.client(1)
    first.next("welcome")
    second.next("welcome")
    with caplog.at_level("WARNING"):
        service.send("a", "b", "c")  # all of client 0
        first.next("work")
        first.client.close()
        waits = ["3 fits wait until it is back (federation.placement: pinned)"]
        assert _eventually(lambda: service.links.array_tasks()[0]["waiting"] == waits)
    assert service.links.array_tasks()[1]["waiting"] == []
    assert _eventually(lambda: f"array task 0: {waits[0]}" in caplog.text)
    service.client(0).next("work")
    assert service.links.array_tasks()[0]["waiting"] == []
    service.links.finish("over")


def _eventually(condition: Callable[[], bool], timeout_s: float = 10) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()


def test_a_withdrawn_message_is_cancelled(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    service.send("a")
    peer.next("work")
    service.links.withdraw(["a"])
    assert peer.next("cancel").cancel.message_id == "a"
    peer.answer("a")
    assert service.links.receive(["a"], 0.3) == []


def test_results_that_came_before_the_withdrawal_are_handed_over(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    service.send("a", "b")
    peer.next("work")
    peer.answer("a")
    peer.next("accepted")
    assert [response.message_id for response in service.links.withdraw(["a", "b"])] == ["a"]
    assert peer.next("cancel").cancel.message_id == "b"
    assert service.links.receive(["a", "b"], 0.2) == []


def test_a_message_that_failed_can_be_sent_again_under_its_id(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    blob = Blob("d1", 3, [b"abc"])
    for reason in ("first", "second"):
        service.send("a", blob=blob)
        assert peer.next("work").work.message_id == "a"
        failure = grid_pb2.Failure(reason=reason)
        result = grid_pb2.Result(message_id="a", failure=failure)
        peer.client.send([grid_pb2.FromArrayTask(result=result)])
        (response,) = service.links.receive(["a"], 5)
        assert response.failure is not None
        assert response.failure.reason == reason


def test_the_server_fails_clearly_when_nobody_comes(tmp_path: Path) -> None:
    cluster = Cluster(executor="local", array_task_timeout_s=0.5)
    service = Service(tmp_path, on_idle=ClientArray(RunPaths(tmp_path), cluster).check)
    service.send("a")
    with pytest.raises(PlatformError, match="no work could start"):
        service.links.receive(["a"], 20)
    service.links.finish("over")


def test_whoever_waits_for_slurm_does_not_hold_the_links_up(tmp_path: Path) -> None:
    asked, answered = threading.Event(), threading.Event()

    def ask(*_: object) -> None:
        asked.set()
        answered.wait(10)

    service = Service(tmp_path, on_idle=ask, liveness_timeout_s=30)
    waiter = threading.Thread(target=service.links.receive, args=(["b"], 0.1))
    waiter.start()
    assert asked.wait(5)
    peer = service.client()
    peer.next("welcome")
    service.send("a")
    peer.next("work")
    peer.answer("a")
    peer.next("accepted", 3)
    answered.set()
    waiter.join(10)
    service.links.finish("over")


def test_the_clock_for_deadlines_stands_while_no_array_task_is_there(service: Service) -> None:
    start_s = service.links.clock_s()
    time.sleep(0.2)
    assert service.links.clock_s() == start_s
    service.client().next("welcome")
    start_s = service.links.clock_s()
    time.sleep(0.2)
    assert service.links.clock_s() >= start_s + 0.2


def test_everybody_is_told_when_the_run_ends(service: Service) -> None:
    peer = service.client()
    peer.next("welcome")
    service.links.finish("finished", timeout_s=2)
    assert peer.next("finish").finish.reason == "finished"


def test_an_array_task_notices_a_server_that_falls_silent(tmp_path: Path) -> None:
    service = Service(tmp_path, liveness_timeout_s=3600)  # it beats every 12 minutes
    credentials = certificates.client_credentials(service.paths.secrets)
    hello = grid_pb2.Hello(run_id="run", slots=1)
    client = LinkClient(service.address, credentials, hello, 1.0)
    start_s = time.monotonic()
    with pytest.raises(PlatformError, match="the server was silent"):
        list(client.events())
    assert time.monotonic() - start_s < 5
    client.close()
    service.links.finish("over", timeout_s=1)


def test_an_array_task_that_was_stalled_itself_does_not_blame_the_server(tmp_path: Path) -> None:
    service = Service(tmp_path, liveness_timeout_s=4.0)
    stalled = threading.Event()

    def waiting() -> list[str]:
        """Hold up the thread of heartbeats once, as the test does with that of events."""
        if not stalled.is_set():
            stalled.set()
            time.sleep(2.5)
        return []

    credentials = certificates.client_credentials(service.paths.secrets)
    hello = grid_pb2.Hello(run_id="run", slots=1)
    client = LinkClient(service.address, credentials, hello, 1.5, waiting)
    events = client.events()
    assert next(events).HasField("welcome")
    assert stalled.wait(5)
    time.sleep(3.0)
    service.send("a")
    assert any(event.HasField("work") for event in events)
    client.close()
    service.links.finish("over", timeout_s=1)
