"""Which address of this machine other nodes reach."""

import fcntl
import ipaddress
import logging
import resource
import socket
import struct

from fedhpc.config import Cluster
from fedhpc.errors import PlatformError

logger = logging.getLogger(__name__)

_SIOCGIFADDR = 0x8915
_OTHER_FILES = 256  # that a process may have open besides


def allow_connections(count: int) -> None:
    """Let this process have so many connections at a time: most systems say 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        logger.warning(
            "%d array tasks may connect, and only %d files may be open here (ulimit -Hn)",
            count, allowed,
        )  # fmt: skip


def server_address(cluster: Cluster) -> str:
    """Return the address that the server of a run listens on.

    Raises
    ------
    PlatformError
        If there is no such interface.
    """
    if cluster.executor == "local" and cluster.interface is None:
        return "127.0.0.1"
    return reachable_address(cluster.interface)


def reachable_address(interface: str | None) -> str:
    """Return the address to listen on.

    Parameters
    ----------
    interface : str or None
        Name of an interface (ib0) or an address of this machine. None: the address that this
        machine's name resolves to, or that its default route uses.

    Raises
    ------
    PlatformError
        If there is no such interface.
    """
    if interface is not None:
        return _address_of(interface)
    return _own_name_address() or _default_route_address() or "127.0.0.1"


def _address_of(interface: str) -> str:
    try:
        return str(ipaddress.ip_address(interface))
    except ValueError:
        pass
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, request)
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise PlatformError(
                f"cluster.interface: expected an interface with an IPv4 address on"
                f" {socket.gethostname()}, found '{interface}': {error.strerror}",
                f"its interfaces: {names}",
            ) from error
    return socket.inet_ntoa(answer[20:24])


def _own_name_address() -> str | None:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    except OSError:
        return None
    addresses = [str(entry[4][0]) for entry in found]
    # Debian maps a machine's own name to 127.0.1.1.
    return next((a for a in addresses if not ipaddress.ip_address(a).is_loopback), None)


def _default_route_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("10.255.255.255", 1))  # UDP: only the route is looked up, nothing is sent
        except OSError:
            return None
        address = str(sock.getsockname()[0])
    return None if ipaddress.ip_address(address).is_unspecified else address
