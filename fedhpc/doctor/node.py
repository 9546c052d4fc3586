"""The doctor's two jobs, and what they tell each other and the login node through its folder."""

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fedhpc import allotment, config, environment, files, network, run_state
from fedhpc.cluster import options
from fedhpc.doctor import checks
from fedhpc.doctor.checks import Doubt
from fedhpc.errors import PlatformError
from fedhpc.isolation import ChildPool, PoolOptions, Slot
from fedhpc.isolation.nvml import open_nvml
from fedhpc.paths import RunPaths

Role = Literal["login", "server", "client-0"]
JOBS: tuple[Role, ...] = ("server", "client-0")
TITLES = {"login": "login node", "server": "server job", "client-0": "array task"}

_ECHO_TIMEOUT_S = 70.0  # NFS clients may trust what they know of a folder for 60 s
_ECHO_PAUSE_S = 0.1
_SLOW_S = 5.0
_CONNECT_TIMEOUT_S = 10.0
_TRY_TIMEOUT_S = 3.0


def server(root: str) -> None:
    """Be the server job of a doctor's folder."""
    Node(RunPaths(Path(root)), "server").run()


def client(root: str, _index: int = 0) -> None:
    """Be the array task of a doctor's folder."""
    Node(RunPaths(Path(root)), "client-0").run()


class Node:
    """One job of the pair: the server job or the array task of a doctor's folder."""

    def __init__(self, paths: RunPaths, role: Role) -> None:
        self._paths = paths
        self._role = role
        self._config = config.load(paths.config)
        of_role = options.of_server if role == "server" else options.of_clients
        self._options = of_role(self._config.cluster)
        self._environment = environment.current()
        self._report: dict[str, Any] = {
            "where": f"{TITLES[role]} ({self._environment.host})",
            "machine": [self._environment.host, checks.boot_id()],
            "lock_folder": checks.lock_folder(self._config.isolation),
            "versions": checks.versions(),
            "checks": [],
        }

    def run(self) -> None:
        """Look at this node, then at the other one."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)  # submitit would ignore the one and requeue
        run_state.register_process(self._paths, self._role, self._environment.job_id)
        answer_in_background(self._paths, self._role)
        if self._role == "server":
            self._look("server's port", self._listen)
        self._tell()
        self._look("shared folder", echo, self._paths, self._role, "login")
        self._look_here()
        self._tell()  # the other job may never start
        if self._role == "server":
            self._wait_for("client-0", "done")  # it connects, and wants answers
        else:
            self._look_at_server()
        self._tell(done=True)

    def _look(self, name: str, look: Callable[..., str], *arguments: Any) -> None:
        found = checks.check(name, self._report["where"], look, *arguments)
        self._report["checks"].append(asdict(found))

    def _tell(self, **more: Any) -> None:
        self._report |= more
        files.write_json(self._paths.root / f"{self._role}.json", self._report)

    def _look_here(self) -> None:
        app, isolation = self._config.app, self._config.isolation
        self._look("cores", checks.cores, self._options.cpus_per_task, isolation.threads_per_fit)
        if app.is_builtin:
            self._look("data", checks.data, self._config)
        else:
            self._look("app", checks.app, self._config)
        if self._environment.on_slurm:
            self._look("Slurm's commands", checks.slurm_commands, self._environment.job_id)
        threads, gpus = isolation.threads_per_fit, options.gpus(self._options)
        # One child on each GPU; where a GPU is missing the check says so, and the CPU is tried.
        one_each = isolation.model_copy(update={"slots": 1, "slots_per_gpu": 1})
        nvml = open_nvml()
        try:
            slots = allotment.slots(one_each, self._environment, nvml)
        except PlatformError as error:
            self._look("GPUs", _raise, error)
            slots = [Slot(0)]
        else:
            if self._role == "client-0" or gpus:
                self._look("GPUs", checks.gpus, gpus, isolation, slots)
        how = PoolOptions(
            isolation.start_method, threads_per_fit=threads, standby=False, huge_pages=False
        )
        with ChildPool(how, nvml) as pool:
            for slot in slots[:1] if self._role == "server" else slots:  # as in a run
                gpu = ", ".join(gpu.id for gpu in slot.gpus)
                self._look(f"child on GPU {gpu}" if gpu else "child", checks.child, pool, slot)

    def _look_at_server(self) -> None:
        server = self._wait_for("server", "machine")
        if not server:
            return  # the login node knows why
        same_node = server["machine"] == self._report["machine"]
        self._look("shared folder", echo, self._paths, self._role, "server")
        alone = same_node and self._environment.on_slurm
        self._look("server's port", reach, server, self._paths.run_id, alone)
        other = server["lock_folder"] if same_node else None
        self._look("slot locks", checks.locks, self._config.isolation, other)

    def _listen(self) -> str:
        """Listen where the server of a run would, and on another port at every address.

        The other one tells, if the first is out of reach, which interface to choose.
        """
        addresses, word = own_addresses(), self._paths.run_id
        self._report |= {"addresses": addresses, "any_port": listen("", word)}
        address = network.server_address(self._config.cluster)
        try:
            port = listen(address, word)
        except OSError as error:
            found = f"could not listen on {address}: {error.strerror}; here: {_named(addresses)}"
            raise PlatformError(found, "choose with --set cluster.interface=NAME") from error
        self._report |= {"address": address, "port": port}
        return f"listens on {address}, port {port}"

    def _wait_for(self, role: Role, key: str) -> dict[str, Any]:
        """Wait until a job has told something; return all that it told, or nothing."""
        limit_s = 60 * (self._config.cluster.time_min or 1)
        files.wait_until(lambda: key in report(self._paths, role), limit_s, 0.05, 0.2)
        return report(self._paths, role)


def report(paths: RunPaths, role: Role) -> dict[str, Any]:
    """Return what a job told so far."""
    files.refresh_directory(paths.root)
    return files.read_json(paths.root / f"{role}.json") or {}


def answer_in_background(paths: RunPaths, me: Role) -> None:
    """Answer each question to this party as long as its process lives."""

    def answer() -> None:
        while True:
            for question in paths.root.glob(f"*.{me}.question"):
                with contextlib.suppress(PlatformError):
                    if not question.with_suffix(".answer").exists():
                        files.write_atomic(question.with_suffix(".answer"), "")
            time.sleep(_ECHO_PAUSE_S)

    threading.Thread(target=answer, name="answers", daemon=True).start()


def echo(paths: RunPaths, me: Role, other: Role) -> str:
    """Write a file, once, and wait for one that another party writes when it sees it."""
    question = paths.root / f"{me}.{other}.question"
    start_s = time.monotonic()
    files.write_atomic(question, "")

    def answered() -> bool:
        files.refresh_directory(paths.root)
        return question.with_suffix(".answer").exists()

    if not files.wait_until(answered, _ECHO_TIMEOUT_S, max_pause_s=_ECHO_PAUSE_S):
        raise PlatformError(
            f"wrote {question}, saw no answer of the {TITLES[other]} in {_ECHO_TIMEOUT_S:.0f} s",
            "name a folder that all nodes see and write with --set cluster.runs_dir=DIR",
        )
    seconds = time.monotonic() - start_s
    found = f"the {TITLES[other]} saw a file of this node and answered: {seconds:.2f} s"
    if seconds > _SLOW_S:
        raise Doubt(found, "everything starts later by as much: is there a faster shared disk?")
    return found


def _raise(error: PlatformError) -> str:
    raise error


def own_addresses() -> dict[str, str]:
    """Return the IPv4 address of each interface of this machine that has one."""
    found = {}
    for _, name in socket.if_nameindex():
        with contextlib.suppress(PlatformError):
            found[name] = network.reachable_address(name)
    return found


def _named(addresses: dict[str, str]) -> str:
    return ", ".join(f"{address} ({name})" for name, address in addresses.items())


def listen(address: str, word: str) -> int:
    """Say a word to whoever connects, as long as this process lives; return the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, 0), family=family)

    def greet() -> None:
        while True:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.sendall(word.encode())

    threading.Thread(target=greet, name="greetings", daemon=True).start()
    return int(listener.getsockname()[1])


def reach(server: dict[str, Any], word: str, alone: bool) -> str:
    """Connect to the port in the server job's report, where it says ``word``.

    ``alone`` means that the array task is on the same node of a cluster, which proves little.
    """
    if "port" not in server:
        raise PlatformError("the server job could not listen", _what_works(server, word))
    target = f"{server['address']}, port {server['port']}, of the {server['where']}"
    try:
        seconds = _greeting(server["address"], server["port"], word, _CONNECT_TIMEOUT_S)
    except OSError as error:
        theirs, here = _named(server["addresses"]), _named(own_addresses())
        raise PlatformError(
            f"could not reach {target}: {error.strerror or error}; there: {theirs}; here: {here}",
            _what_works(server, word),
        ) from error
    found = f"reached {target} in {1000 * seconds:.1f} ms"
    if alone:
        raise Doubt(
            f"{found}; but it is this node, so nothing between nodes was tried",
            "name two: --set cluster.server.nodelist=A --set cluster.clients.nodelist=B",
        )
    return found


def _greeting(address: str, port: int, word: str, timeout_s: float) -> float:
    """Connect, check that the server job answers, and return the seconds that it took."""
    start_s = time.monotonic()
    with (
        socket.create_connection((address, port), timeout_s) as connection,
        connection.makefile("rb") as stream,
    ):
        if stream.read(len(word)) != word.encode():
            raise ConnectionError("something else answers there")
    return time.monotonic() - start_s


def _what_works(server: dict[str, Any], word: str) -> str:
    """Return what to do: an interface of the server's node that is reached from here, if any."""
    for name, address in server["addresses"].items():
        with contextlib.suppress(OSError):
            if name != "lo":
                _greeting(address, server["any_port"], word, _TRY_TIMEOUT_S)
                return f"--set cluster.interface={name}, which is reached from here"
    return (
        "name an interface that the nodes share with --set cluster.interface=NAME, or ask the site"
        " whether nodes may connect to each other"
    )
