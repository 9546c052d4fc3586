"""Whether a client node reaches the server's port, over which address."""

import contextlib
import os
import socket
import socketserver
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

from fedhpc import network
from fedhpc.config import Config
from fedhpc.doctor.report import Check
from fedhpc.errors import PlatformError

_CONNECT_TIMEOUT_S = 10.0
_OTHER_TIMEOUT_S = 3.0
_PINGS = 20
_POLL_S = 0.05  # until it notices that it is to end
_NAME = "server's port"


@dataclass(frozen=True)
class Address:
    """An address of the server's node.

    Attributes
    ----------
    interface : str
        Its interface, "" if none has it.
    address : str
        IPv4 or IPv6.
    port : int
        Where it listens.
    """

    interface: str
    address: str
    port: int = 0

    def __str__(self) -> str:
        return f"{self.address} ({self.interface})" if self.interface else self.address


def addresses() -> list[Address]:
    """Return the IPv4 addresses of this machine, by interface."""
    found = []
    for _, name in socket.if_nameindex():
        with contextlib.suppress(PlatformError):  # it has none
            found.append(Address(name, network.reachable_address(name)))
    return found


def chosen(config: Config) -> Address:
    """Return the address that the server of a run would listen on.

    Raises
    ------
    PlatformError
        If there is no such interface.
    """
    cluster = config.cluster
    # As fedhpc.server does.
    local = cluster.executor == "local" and cluster.interface is None
    address = "127.0.0.1" if local else network.reachable_address(cluster.interface)
    name = next((own.interface for own in addresses() if own.address == address), "")
    return Address(name, address)


class _Handler(socketserver.StreamRequestHandler):
    """Proves who it is to somebody who knows the token, then repeats every line."""

    timeout = 30

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, _Server)  # noqa: S101
        with contextlib.suppress(OSError):
            if self.rfile.readline(100).decode().strip() != server.token:
                return
            self.wfile.write(f"{server.token[::-1]}\n".encode())
            while line := self.rfile.readline(100):
                self.wfile.write(line)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, address: str, token: str) -> None:
        self.token = token
        if ":" in address:
            self.address_family = socket.AF_INET6
        super().__init__((address, 0), _Handler)


@contextlib.contextmanager
def listening(config: Config) -> Iterator[dict[str, Any]]:
    """Listen where the server of a run would, and on this node's other addresses.

    The others tell, if the chosen one is out of reach, which one to choose.

    Yields
    ------
    dict
        What the client has to know: "token", "chosen" (None if it failed), "others", "problem".
    """
    token = os.urandom(16).hex()
    servers: list[_Server] = []
    told: dict[str, Any] = {"token": token, "chosen": None, "others": [], "problem": None}

    def listen(where: Address) -> dict[str, Any]:
        server = _Server(where.address, token)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(_POLL_S,), daemon=True).start()
        return asdict(Address(where.interface, where.address, server.server_address[1]))

    try:
        wanted = chosen(config)
        told["chosen"] = listen(wanted)
    except PlatformError as error:
        told["problem"] = error.message
    except OSError as error:
        told["problem"] = f"could not listen on {wanted}: {error.strerror}"
    listens = told["chosen"] and told["chosen"]["address"]
    for own in addresses():
        if own.address != listens and not ip_address(own.address).is_loopback:
            with contextlib.suppress(OSError):
                told["others"].append(listen(own))
    try:
        yield told
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def check_listening(told: Mapping[str, Any], where: str) -> Check:
    """Say, on the server's node, where it listens."""
    if told["problem"]:
        remedy = f"--set cluster.interface=NAME; this node has {_interfaces()}"
        return Check(_NAME, where, "fail", told["problem"], remedy)
    return Check(_NAME, where, "pass", f"listens on {_shown(told['chosen'])}")


def check_reach(told: Mapping[str, Any], where: str, server_host: str, *, on_slurm: bool) -> Check:
    """Connect to the server's node, on a client's node.

    Parameters
    ----------
    told : mapping
        What `listening` yielded.
    where : str
        This party.
    server_host : str
        The other node.
    on_slurm : bool
        Whether a run's jobs may be on several nodes.
    """
    if told["chosen"] is None:
        found = f"the server ({server_host}) has no address to connect to"
        return Check(_NAME, where, "fail", found, _advice(told["token"], told["others"]))
    target = Address(**told["chosen"])
    try:
        seconds = _exchange(target, told["token"], _CONNECT_TIMEOUT_S)
    except (OSError, PlatformError) as error:
        theirs = ", ".join(map(_shown, [told["chosen"], *told["others"]]))
        found = (
            f"could not reach {target}, port {target.port}, of the server ({server_host}):"
            f" {_why(error)}; its addresses: {theirs}; here: {_interfaces()}"
        )
        return Check(_NAME, where, "fail", found, _advice(told["token"], told["others"]))
    found = (
        f"reached {target}, port {target.port}, of the server ({server_host}); round trip"
        f" {1000 * seconds:.2f} ms"
    )
    if on_slurm and server_host == socket.gethostname():
        return Check(
            _NAME,
            where,
            "warn",
            f"{found}; but both jobs were on this one node, so nothing between nodes was tried",
            "name two nodes: --set cluster.server.nodelist=A --set cluster.clients.nodelist=B",
        )
    return Check(_NAME, where, "pass", found)


def _exchange(target: Address, token: str, timeout_s: float) -> float:
    """Connect, exchange tokens, and return the median round trip in seconds."""
    connection = socket.create_connection((target.address, target.port), timeout_s)
    with connection, connection.makefile("rwb", buffering=0) as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.write(f"{token}\n".encode())
        if stream.readline(100).decode(errors="replace").strip() != token[::-1]:
            raise PlatformError("something else answers there")
        trips = []
        for _ in range(_PINGS):
            start_s = time.perf_counter()
            stream.write(b"ping\n")
            if stream.readline(100) != b"ping\n":
                raise PlatformError("the connection broke off")
            trips.append(time.perf_counter() - start_s)
    return statistics.median(trips)


def _advice(token: str, others: Sequence[Mapping[str, Any]]) -> str:
    """Try the server node's other addresses and return what to do."""
    reached = []
    for other in others:
        with contextlib.suppress(OSError, PlatformError):
            _exchange(Address(**other), token, _OTHER_TIMEOUT_S)
            reached.append(other)
    if reached:
        shown = ", ".join(map(_shown, reached))
        return f"--set cluster.interface={reached[0]['interface']}; reached from here: {shown}"
    return (
        "name an interface that both nodes have with --set cluster.interface=NAME, or ask the site"
        " whether nodes may open TCP connections to each other"
    )


def _shown(address: Mapping[str, Any]) -> str:
    return str(Address(**address))


def _interfaces() -> str:
    return ", ".join(map(str, addresses()))


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_CONNECT_TIMEOUT_S:.0f} s, as with a firewall"
    return getattr(error, "strerror", None) or str(error)
