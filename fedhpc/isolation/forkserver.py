"""The fork server: a small single-threaded process from which every child is forked.

It imports once what is slow to import, touches no CUDA and starts no thread. The array task asks
for children over a control socket; each child gets a channel of its own to the array task.
It is the subreaper of all of them: when a child ends, whatever the child left behind is killed, and
when the array task is gone, so are the children and then the fork server.

``multiprocessing.forkserver`` is not used because its children import the parent's main module
again, it cannot prepare a child ahead, reports no signal of a dead child's descendants and keeps
a resource tracker process.
"""

import contextlib
import ctypes
import gc
import importlib
import os
import select
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedhpc.isolation import channel, child, cuda, host_memory, preloading
from fedhpc.isolation.image import Image, keep_what_is_freed

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LESSON_TIMEOUT_S = 60.0
_WORTH_S = 0.03  # of imports in every child: less is not worth the time to learn it


def main() -> None:
    """Serve the control socket whose number is the first argument, with options in the second."""
    control = socket.socket(fileno=int(sys.argv[1]))
    received = channel.receive(control)
    if received is not None:
        ForkServer(control, received.message).serve()
    child.leave(0)


class ForkServer:
    """Forks children on demand and outlives none of its purposes.

    Parameters
    ----------
    control : socket
        Connection to the array task.
    options : dict
        ``preload`` (modules), ``spawn`` (exec a new interpreter instead of a bare fork),
        ``huge_pages`` (see `Image`),
        ``prepare_early`` (call the children's ``prepare`` here, once), ``rehearse`` (what else to
        call here, or None) and ``child`` (passed on to each child).
    """

    def __init__(self, control: socket.socket, options: dict[str, Any]) -> None:
        self._control = control
        self._options = options
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._live: dict[int, int] = {}  # pid -> the number the array task knows it by
        self._pid = os.getpid()
        self._refusal = ""  # why children cannot use CUDA
        self._has_context = False
        self._image = Image() if options["huge_pages"] else None

    def serve(self) -> None:
        """Serve until the array task closes its end."""
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Slurm sends it to all processes of a job; what it means is the array task's to say, and
        # children go on until then.
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        with self._leaving_if_abandoned():
            self._preload()
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it leaves when the array task does
        selector = selectors.DefaultSelector()
        selector.register(self._control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        try:
            while True:
                unmerged = self._image is not None and not self._image.is_settled
                ready = {key.fileobj for key, _ in selector.select(0 if unmerged else None)}
                if not ready and self._image is not None:
                    self._image.merge_some()
                if wake_read in ready:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wake_read, 4096)
                    self._reap()
                if self._control in ready and not self._handle_request():
                    return
        except BrokenPipeError:
            return
        finally:
            self._kill_everything()

    @contextlib.contextmanager
    def _leaving_if_abandoned(self) -> Iterator[None]:
        """Look now and then whether anybody still waits: an import may take long."""
        signal.signal(signal.SIGALRM, lambda *_: os._exit(1) if self._abandoned() else None)
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        yield
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _preload(self) -> None:
        gc.disable()  # a quarter of the time of importing torch, for hardly any garbage
        for name in self._options["preload"]:
            # A module that cannot be imported fails in the child too, with the right traceback.
            with contextlib.suppress(Exception, SystemExit):
                importlib.import_module(name)
            self._check_for_cuda(f"importing {name}, from isolation.preload,")
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.set_num_threads(1)  # what runs here must not start a pool of threads
        if self._options["prepare_early"]:
            what = f"{self._options['child']['prepare']}, called in advance,"
            # If it fails, each child tries again and tells its caller why.
            with contextlib.suppress(Exception, SystemExit):
                child.prepare(self._options["child"])
                self._options["child"]["prepare"] = None
            self._check_for_cuda(what)
        if self._options["rehearse"]:
            noting = self._image.rehearsing() if self._image else contextlib.nullcontext()
            with noting, contextlib.suppress(Exception, SystemExit):  # the first fit tells
                child.resolve(self._options["rehearse"])(self._options["child"]["prepare_arg"])
        if torch is not None:
            torch.set_num_threads(self._options["child"]["threads"])
        self._settle()
        gc.enable()

    def _settle(self) -> None:
        """Make what is in memory now cheap to share."""
        # Children must not write to pages of objects they only share with this process.
        gc.freeze()
        if self._image is not None:
            self._image.settle()
        else:
            keep_what_is_freed()

    def _learn(self, names: list[str]) -> None:
        """Import more modules, if it is worth it and another process found that they may be."""
        names = [name for name in names if name not in sys.modules]
        read, write = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if not pid:
            try:
                self._become_child()
                preloading.try_out(names, write)
            finally:
                os._exit(0)
        _prefer_for_oom_killer(pid)
        os.close(write)
        text, end_s = b"", time.monotonic() + _LESSON_TIMEOUT_S
        while select.select([read], [], [], max(0.0, end_s - time.monotonic()))[0]:
            part = os.read(read, 65536)
            if not part:
                break
            text += part
        os.close(read)
        _kill_group(pid)
        os.waitpid(pid, 0)
        good, seconds = preloading.results(text)
        if seconds < _WORTH_S:
            return
        for name in good:
            with contextlib.suppress(Exception, SystemExit):
                importlib.import_module(name)
        self._check_for_cuda("importing what fits import late")
        self._settle()
        channel.send(
            self._control, {"event": "preloaded", "modules": len(good), "seconds": seconds}
        )

    def _check_for_cuda(self, what: str) -> None:
        """Let no child start its work if CUDA is in use here: it cannot be used after a fork."""
        if self._refusal:
            return
        self._has_context = cuda.is_initialised()
        if self._has_context or cuda.driver_in_use():
            self._refusal = (
                f"{what} used CUDA in the fork server, so no child can use it any more"
                "\n  Hint: leave it out of isolation.preload, or set isolation.learn_preload: false"
                " or isolation.start_method: spawn"
            )

    def _abandoned(self) -> bool:
        # Not a peek: requests may be queued before the end.
        poller = select.poll()
        poller.register(self._control, 0)
        return any(event & select.POLLHUP for _, event in poller.poll(0))

    def _handle_request(self) -> bool:
        received = channel.receive(self._control)
        if received is None:
            return False
        message, fds = received.message, received.fds
        if message["request"] == "start":
            try:
                pid = self._start_child(fds[0], message["child"])
                self._live[pid] = message["number"]
                channel.send(
                    self._control, {"event": "started", "number": message["number"], "pid": pid}
                )
            except ConnectionError:
                return False
            except OSError:  # no process to be had: this call fails, the others go on
                sys.excepthook(*sys.exc_info())
                channel.send(
                    self._control, {"event": "exited", "number": message["number"], "code": 1}
                )
            channel.close_all(fds)
        elif message["request"] == "preload":
            with self._leaving_if_abandoned():
                self._learn(message["modules"])
        elif message["request"] == "kill":
            for pid, number in self._live.items():
                if number == message["number"]:
                    _kill_group(pid)
        return True

    def _start_child(self, channel_fd: int, options: dict[str, Any]) -> int:
        pid = os.fork()
        if pid:
            _prefer_for_oom_killer(pid)
            return pid
        code = 1
        try:
            self._become_child()
            if self._options["spawn"]:
                os.set_inheritable(channel_fd, True)
                python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
                os.execv(  # noqa: S606
                    sys.executable, [*python, "-m", "fedhpc.isolation.child", str(channel_fd)]
                )
            sock = socket.socket(fileno=channel_fd)
            refuse = self._has_context or bool(options["env"].get("CUDA_VISIBLE_DEVICES"))
            options = {**self._options["child"], **options}
            options["refuse"] = self._refusal if refuse else ""
            code = child.Child(sock, options).serve()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            child.leave(code)
        return 0  # never reached

    def _become_child(self) -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        self._libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != self._pid:  # it died before the line above
            os._exit(1)
        # A daemon of the app becomes this child's, so an orphan is always a dead child's.
        self._libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._control.close()

    def _reap(self) -> None:
        while True:
            try:
                # Peek only: until it is reaped, nobody else can get its pid or its group's.
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            number = self._live.pop(info.si_pid, None)
            if number is not None:
                _kill_group(info.si_pid)
            _, status = os.waitpid(info.si_pid, 0)
            self._kill_orphans()  # also after an orphan: its own children are ours now
            if number is not None:
                code = os.waitstatus_to_exitcode(status)
                channel.send(self._control, {"event": "exited", "number": number, "code": code})

    def _kill_orphans(self) -> None:
        for pid in host_memory.children_of(self._pid):
            if pid not in self._live:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _kill_everything(self) -> None:
        for pid in self._live:
            _kill_group(pid)
        self._live.clear()
        # Killing a process hands its children to us, so repeat until none is left.
        while True:
            self._kill_orphans()
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _prefer_for_oom_killer(pid: int) -> None:
    """Let the kernel take a child, not the array task, under memory pressure.

    Not said by the child itself: what that needs would have to be copied for it.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("500")


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # a child that was just forked has no group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
