"""What the links cost a fit, with clients that answer at once: python benchmarks/links.py.

A server with real links (gRPC, mutual TLS) and, in a process of their own, array tasks that answer
every message with a small reply. Prints CPU time per fit of the server and of the array tasks, for
cohorts of several sizes.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedhpc.federation import certificates, grid_pb2
from fedhpc.federation.dispatch import Dispatch
from fedhpc.federation.link import LinkClient
from fedhpc.federation.link_server import LinkServer
from fedhpc.federation.payload import Packed
from fedhpc.federation.peer import LinkOptions
from fedhpc.federation.transport import Request
from fedhpc.paths import RunPaths

SMALL = b"x" * 500  # about what a message of Flower's is without its arrays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--array-tasks", type=int, default=4)
    parser.add_argument("--slots", type=int, nargs="*", default=[2, 16])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    for slots in options.slots:
        for clients in options.clients:
            measured = [
                measure(clients, options.array_tasks, slots) for _ in range(options.repeats)
            ]
            server_ms, tasks_ms, wall_ms = map(min, zip(*measured, strict=True))
            print(
                f"{options.array_tasks} array tasks, {slots:>3} slots each, cohort {clients:>6}:"
                f" CPU per fit {server_ms:.2f} ms in the server, {tasks_ms:.2f} ms in the array"
                f" tasks; wall {wall_ms:.2f} ms",
                flush=True,
            )


def measure(clients: int, array_tasks: int, slots: int) -> tuple[float, float, float]:
    """Return CPU time per fit of the server and of the array tasks, and wall time, in ms."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        paths = RunPaths(Path(folder) / "run")
        paths.blobs.mkdir(parents=True)
        certificates.create(paths.secrets)
        links = LinkServer(
            Dispatch(array_tasks=array_tasks, min_array_tasks=array_tasks),
            LinkOptions("run", 1, 60.0, 10_000_000, lambda *_: None),
            paths,
            certificates.server_credentials(paths.secrets),
        )
        address = f"127.0.0.1:{links.start('127.0.0.1')}"
        ours, theirs = context.Pipe()
        others = context.Process(
            target=answer, args=(theirs, str(paths.secrets), address, array_tasks, slots)
        )
        others.start()
        ours.recv()
        exchange(links, "warm", 50)
        ours.send("begin")
        start_s, start_cpu_s = time.monotonic(), cpu_s()
        exchange(links, "run", clients)
        wall_s, server_s = time.monotonic() - start_s, cpu_s() - start_cpu_s
        ours.send("end")
        tasks_s = ours.recv()
        links.finish("over")
        others.join(10)
        others.kill()
    return tuple(1000 * seconds / clients for seconds in (server_s, tasks_s, wall_s))  # type: ignore[return-value]


def exchange(links: LinkServer, name: str, clients: int) -> None:
    """Send a cohort and receive its replies."""
    packed = Packed(grid_pb2.Payload(message=SMALL), [])
    requests = [Request(f"{name}-{client}", client, packed) for client in range(clients)]
    links.send(requests)
    waiting = {request.message_id for request in requests}
    deadline_s = time.monotonic() + 300
    while waiting:
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{len(waiting)} of {clients} messages have no answer")
        waiting -= {response.message_id for response in links.receive(waiting, 1.0)}


def answer(pipe: Any, secrets: str, address: str, array_tasks: int, slots: int) -> None:
    """Be array tasks, and answer at once, until told to end."""
    import threading

    credentials = certificates.client_credentials(Path(secrets))

    def serve(link: LinkClient) -> None:
        for event in link.events():
            if event.HasField("work"):
                link.send(reply_to(event.work.message_id))

    for task in range(array_tasks):
        hello = grid_pb2.Hello(run_id="run", array_task=task, slots=slots)
        link = LinkClient(address, credentials, hello, 60.0)
        threading.Thread(target=serve, args=(link,), daemon=True).start()
    pipe.send("ready")
    pipe.recv()
    start_s = cpu_s()
    pipe.recv()
    pipe.send(cpu_s() - start_s)


def reply_to(message_id: str) -> Iterable[grid_pb2.FromArrayTask]:
    """Return a small result."""
    payload = grid_pb2.Payload(message=SMALL).SerializeToString()
    fit = grid_pb2.Fit(slot=1, wait_s=0.1, start_s=0.1, run_s=0.1, return_s=0.1, peak_rss_mb=100.0)
    result = grid_pb2.Result(message_id=message_id, payload=payload, fit=fit)
    return [grid_pb2.FromArrayTask(result=result)]


def cpu_s() -> float:
    """Return the CPU time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
