"""The server job: ``python -m fedhpc.server RUN_DIR``."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from fedhpc import (
    config,
    environment,
    files,
    logging_setup,
    network,
    rendezvous,
    requeue,
    run_state,
)
from fedhpc.cluster import entries
from fedhpc.errors import FedHPCError, PlatformError, RunError, Superseded
from fedhpc.federation import apps, certificates, compat, dispatch, fit, issuer, plain
from fedhpc.federation.checkpoint import CheckpointStore
from fedhpc.federation.grid import HpcGrid
from fedhpc.federation.inprocess import InProcess
from fedhpc.federation.link_server import LinkServer
from fedhpc.federation.payload import encode_arrays
from fedhpc.federation.peer import LinkOptions
from fedhpc.federation.recorder import Recorder
from fedhpc.federation.rounds import Rounds
from fedhpc.federation.states import ClientStates
from fedhpc.federation.transport import Transport
from fedhpc.oversight import ClientArray
from fedhpc.paths import RunPaths, latest_attempt, open_run_folder
from fedhpc.requeue import Fate

logger = logging.getLogger(__name__)

_STATUS_S = 0.5
_STATUS_AGAIN_S = 5.0  # also where nothing is new: somebody may have written something else
_LAST_WRITE_S = 4.0
_SIGNAL_S = 0.3
_KILLED_BY_SIGNAL = 128


class _Stop(BaseException):
    """Raised in the main thread by a signal, whatever the app is doing."""

    def __init__(self, signum: int) -> None:
        self.signum = signum
        self.fate: Fate | None = None
        super().__init__(signal.Signals(signum).name)


class Server:
    """One attempt at a run.

    Parameters
    ----------
    paths : RunPaths
        Of the run.
    """

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._config = config.load(paths.config)
        self._environment = environment.current()
        self._recorder = Recorder(paths)
        if (ended := run_state.read(paths))["state"] in run_state.ENDED:
            raise RunError(
                f"the run has ended already: {ended['state']} {ended['reason']}",
                f"to go on with it: fedhpc submit --resume {paths.root}",
            )
        self._attempt = _claim_attempt(paths)
        self._fence = rendezvous.Fence(paths, self._attempt)
        settings = self._config.checkpoint
        self._checkpoints = CheckpointStore(paths, settings, self._attempt)
        self._rounds = Rounds(self._checkpoints, self._config)
        self._clients = ClientArray(paths, self._config.cluster)
        self._superseded = threading.Event()
        self._links: LinkServer | None = None

    def _go_on(self) -> None:
        """Go on where the last attempt was: after its newest checkpoint, or at round 1."""
        found = self._checkpoints.load_newest()
        self._paths.model.unlink(missing_ok=True)
        if found is not None:
            self._recorder.go_on_from(plain.decode(found.parts["records"]))
            self._rounds.go_on_from(found)
        else:
            self._paths.metrics.unlink(missing_ok=True)
            self._paths.fits.unlink(missing_ok=True)

    def run(self) -> int:
        """Run the federation to its end; return the exit code.

        Raises
        ------
        PlatformError
            If the disk refuses even to note that this process is there.
        """
        with files.fenced(self._fence.check):
            return self._run()

    def _run(self) -> int:
        run_state.register_process(self._paths, "server", self._environment.job_id)
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR2})
            with self._reporting():
                if self._attempt > 1:
                    self._go_on()
                if self._config.cluster.executor == "debug":
                    self._run_app(InProcess(fit.load(str(self._paths.root))))
                else:
                    with self._links_open() as transport:
                        self._run_app(transport)
        except _Stop as stop:
            fate = stop.fate or self._foresee(stop.signum)
            if fate.returns:
                return self._leave_for_next_attempt(fate)
            if stop.signum == signal.SIGUSR2:
                why = f"{fate.reason}; to go on: fedhpc submit --resume {self._paths.root}"
                return self._end("failed", f"server job: {why}", PlatformError.exit_code)
            code = _KILLED_BY_SIGNAL + stop.signum
            return self._end("cancelled", f"server job: {fate.reason}", code)
        except KeyboardInterrupt:  # the debug executor runs in a terminal
            return self._end("cancelled", "by Ctrl-C", _KILLED_BY_SIGNAL + signal.SIGINT)
        except SystemExit as error:
            return self._end("failed", f"the ServerApp called exit({error.code})")
        except FedHPCError as error:
            return self._end("failed", error.message, error.exit_code)
        except Exception as error:
            logger.error("the ServerApp failed:\n%s", traceback.format_exc())
            with contextlib.suppress(PlatformError):  # it is in the log
                path = self._paths.errors / "server.txt"
                files.write_atomic(path, traceback.format_exc(), patience_s=0.0)
            of_disk = isinstance(error, OSError) and files.is_of_disk(error)
            code = PlatformError.exit_code if of_disk else RunError.exit_code
            return self._end("failed", f"{type(error).__name__}: {error}", code)
        return self._end("finished", "", 0)

    @contextlib.contextmanager
    def _links_open(self) -> Iterator[Transport]:
        """Listen, publish the address, and tell everybody at the end."""
        paths, cluster = self._paths, self._config.cluster
        if not certificates.exist(paths.secrets):
            issuer.create(paths.secrets)
        machine = dispatch.Dispatch(
            array_tasks=cluster.array_tasks,
            placement=self._config.federation.placement,
            min_array_tasks=cluster.min_array_tasks,
            liveness_timeout_s=cluster.liveness_timeout_s,
        )
        options = LinkOptions(
            run_id=paths.run_id,
            attempt=self._attempt,
            liveness_timeout_s=cluster.liveness_timeout_s,
            inline_bytes=int(cluster.inline_mb * 1e6),
            on_idle=self._clients.check,
        )
        links = LinkServer(machine, options, paths, certificates.server_credentials(paths.secrets))
        network.allow_connections(cluster.array_tasks)
        host = network.server_address(cluster)
        port = links.start(host)
        publisher = rendezvous.Publisher(
            paths,
            rendezvous.Rendezvous(
                run_id=paths.run_id,
                attempt=self._attempt,
                address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
                host=self._environment.host,
                pid=os.getpid(),
                job_id=self._environment.job_id,
                phase="serving",
                heartbeat=0,
            ),
            self._supersede,
        )
        self._links = links
        phase: rendezvous.Phase = "failed"
        goes_on = False
        try:
            publisher.start()
            logger.info("attempt %d listens on %s:%d", self._attempt, host, port)
            yield links
            phase = "finished"
        except _Stop as stop:
            stop.fate = self._foresee(stop.signum)
            goes_on = stop.fate.returns
            raise
        finally:
            superseded = self._is_superseded()
            try:
                if not superseded:
                    publisher.end("requeueing" if goes_on else phase)
            except PlatformError as error:  # those who are connected are told so
                logger.warning("%s", error)
            finally:
                if not (superseded or goes_on):
                    certificates.remove(paths.secrets)
                links.finish(None if goes_on or superseded else phase)

    def _run_app(self, transport: Transport) -> None:
        """Call the ServerApp and write the model that its strategy ends with."""
        state_bytes = self._config.cluster.state_mb * 1e6
        grid = HpcGrid(
            transport,
            self._recorder,
            self._paths,
            num_clients=self._config.federation.num_clients,
            seed=self._config.seed,
            states=ClientStates(self._paths, state_bytes, self._checkpoints.refers_to),
            inline_bytes=int(self._config.cluster.inline_mb * 1e6),
            retry=self._config.failures.retry,
        )
        compat.set_identity(self._paths.run_id)
        rounds = self._rounds
        compat.replace_strategy_start(
            lambda strategy, *args, **kwargs: rounds.start(strategy, *args, **kwargs)
        )
        spec = apps.locate(self._config, self._paths)
        app = apps.load_server(spec)
        try:
            try:
                app(grid, apps.server_context(spec, self._paths.run_id))
            except Exception:
                # A signal to the whole job may end a child of ours first, and that is no error of
                # the app: then it is here in a moment.
                time.sleep(_SIGNAL_S)
                raise
        except BaseException:
            for write in (self._checkpoints.close, self._recorder.write_fits):
                with contextlib.suppress(PlatformError):  # there is an error already
                    write(_LAST_WRITE_S)
            raise
        self._checkpoints.close()
        if rounds.final_arrays is not None:
            files.write_atomic(self._paths.model, encode_arrays(rounds.final_arrays).parts)
        else:
            logger.warning("the app did not run a strategy's start(): no model.safetensors")

    # --- what others see ---

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Keep status.json fresh."""
        ended = threading.Event()

        def report() -> None:
            last: object = None
            written_s = 0.0
            failing = False
            while not ended.wait(_STATUS_S):
                try:
                    current = self._status()
                    if current == last and time.monotonic() < written_s + _STATUS_AGAIN_S:
                        continue
                    run_state.write(self._paths, "running", patience_s=0.0, **current)
                    last, written_s, failing = current, time.monotonic(), False
                except Superseded:
                    self._supersede()
                    return
                except Exception as error:  # no reason to say nothing for the rest of the run
                    if not failing:
                        logger.warning("could not refresh the status: %s", error)
                    failing = True

        run_state.write(self._paths, "running", **self._status())
        thread = threading.Thread(target=report, name="status", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _status(self) -> dict[str, Any]:
        return {
            "attempt": self._attempt,
            "array_tasks": self._links.array_tasks() if self._links else [],
            "checkpoint": self._checkpoints.last_round,
            "begins_anew": self._rounds.why_not() if self._recorder.has_sent else "",
            **self._recorder.progress(),
        }

    def _end(self, state: run_state.State, reason: str, code: int = 1) -> int:
        """Write the last status and return the exit code."""
        if self._is_superseded():
            logger.warning("a server with a higher attempt has come; this one leaves")
            return PlatformError.exit_code
        logger.log(logging.INFO if code == 0 else logging.ERROR, "%s %s", state, reason)
        certificates.remove(self._paths.secrets)
        status = self._status() | {"exit_code": code}
        # A run that has failed, perhaps for this disk, has waited for it; one that is done has not.
        patience_s = None if code == 0 else _LAST_WRITE_S
        try:
            if self._paths.model.exists():
                status["model_sha256"] = files.sha256(self._paths.model)
            run_state.write(self._paths, state, reason, patience_s=patience_s, **status)
        except Superseded:
            return PlatformError.exit_code
        except (PlatformError, OSError) as error:
            logger.error("the run has %s, but status.json does not say so: %s", state, error)
            code = code or PlatformError.exit_code
        self._clients.end_pending()
        return code

    def _foresee(self, signum: int) -> Fate:
        """Return whether the server job starts again after a signal, instead of ending the run."""
        cluster = self._config.cluster
        if self._is_superseded() or cluster.executor != "slurm":
            return requeue.stays_away(signum)
        fate = requeue.foresee(signum, self._environment, cluster.max_requeues)
        if fate.returns and fate.by_itself and (why := self._why_not_again()):
            return Fate(False, False, f"{fate.reason}; {why}")
        return fate

    def _has_begun(self) -> bool:
        """Return whether array tasks have been given work in this attempt."""
        return bool(self._recorder.has_sent and self._links and self._links.array_tasks())

    def _why_not_again(self) -> str:
        """Return why there is no point in another attempt; "" if there is."""
        if self._has_begun():
            why = self._rounds.why_not()
            return f"it would begin at round 1 again: {why}" if why else ""
        return "" if self._clients.exists() else f"no array task is left{self._clients.said()}"

    def _leave_for_next_attempt(self, fate: Fate) -> int:
        """Say that the server job is in the queue again, and put it there if Slurm has not."""
        status = self._status()
        done = 0 if status["begins_anew"] else status["checkpoint"] or 0
        why = fate.reason
        if not self._has_begun():
            why += ", and no work has begun" + self._clients.said()
        reason = f"server job: {why}; its next attempt goes on at round {done + 1}"
        logger.warning("%s", reason)
        try:
            run_state.write(
                self._paths, "pending", reason, patience_s=_LAST_WRITE_S, phase="requeueing",
                **status,
            )  # fmt: skip
        except Superseded:
            raise
        except PlatformError as error:  # Slurm knows it too
            logger.warning("%s", error)
        if fate.by_itself:
            try:
                requeue.queue_again(self._environment.job_id)
            except PlatformError as error:
                return self._end("failed", f"{reason}, but: {error.message}", error.exit_code)
        return 0

    def _supersede(self) -> None:
        """Leave, whatever the app is doing; called from other threads."""
        if not self._superseded.is_set():
            self._superseded.set()
            os.kill(os.getpid(), signal.SIGTERM)

    def _is_superseded(self) -> bool:
        """Return whether another server has come, looking for it now."""
        if self._fence.is_passed():
            self._superseded.set()
        return self._superseded.is_set()


def _claim_attempt(paths: RunPaths) -> int:
    number = 1 + files.persist(lambda: latest_attempt(paths), f"list {paths.root}")
    while not files.claim(paths.attempt(number)):
        number += 1
    return number


def _stop_on_signal(signum: int, _frame: FrameType | None) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):  # the way out is not to be interrupted
        signal.signal(number, signal.SIG_IGN)
    raise _Stop(signum)


def run(run_dir: str) -> None:
    """Run the server of a run folder; ends with `SystemExit` unless the run finished."""
    logging_setup.set_up("server")
    # submitit's handlers ignore SIGTERM; these replace them. Python ignores SIGINT already where
    # submit asked for it.
    for signum in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(signum, _stop_on_signal)
    try:
        entries.use_snapshot(run_dir)
        code = Server(open_run_folder(Path(run_dir))).run()
    except FedHPCError as error:
        logger.error("%s", error)
        code = error.exit_code
    except OSError:
        logger.exception("the server ends, as it could not read or write")
        code = PlatformError.exit_code
    except _Stop as stop:
        code = _KILLED_BY_SIGNAL + stop.signum
    if code:
        sys.exit(code)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fedhpc.server RUN_DIR")
    run(sys.argv[1])
