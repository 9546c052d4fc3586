"""The errors of fedhpc, each with the exit code that a shell or Slurm sees."""

from collections.abc import Sequence


class FedHPCError(Exception):
    """Base of every error that fedhpc raises on purpose.

    Parameters
    ----------
    message : str
        What was wanted and what was found, with the value and its place.
    hint : str, optional
        What to do about it. It is appended as ``Hint: ...``.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message = message
        self.hint = hint
        super().__init__(message if hint is None else f"{message}\n  Hint: {hint}")


class ConfigError(FedHPCError):
    """A config or a command line that cannot be run; lists every problem at once.

    Parameters
    ----------
    source : str
        The file (or ``command line``) that the problems were found in.
    problems : sequence of str
        One line a problem, each beginning with the key it is about.
    """

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[str], hint: str | None = None) -> None:
        self.source = source
        self.problems = list(problems)
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(f"{source}: {count}{lines}", hint)


class PlatformError(FedHPCError):
    """The cluster or its disk failed; the same command may work later."""

    exit_code = 75  # EX_TEMPFAIL: Slurm sites requeue on it


class SubmissionError(PlatformError):
    """A job could not be submitted."""


class RendezvousTimeout(PlatformError):
    """No live server published its address within the deadline."""


class Superseded(PlatformError):
    """A server with a higher attempt has come: this one leaves and writes nothing more."""


class LinkRefused(PlatformError):
    """The server does not let this array task work, beside the others that it has."""


class SlotTimeout(PlatformError):
    """No slot, or not enough memory beside it, became free within the deadline."""


class GpuLost(PlatformError):
    """A GPU does not answer any more: what it was to do must be done elsewhere."""


class RunError(FedHPCError):
    """The run itself failed."""


class FitFailed(RunError):
    """The app raised an exception inside a child.

    Parameters
    ----------
    message : str
        The exception's type and text.
    traceback : str
        The child's traceback, as Python prints it.
    """

    def __init__(self, message: str, traceback: str = "", hint: str | None = None) -> None:
        self.traceback = traceback
        super().__init__(message, hint)


class FitOutOfMemory(FitFailed):
    """CUDA had no memory left for a fit, at first or again when it ran alone.

    Attributes
    ----------
    need_bytes : int
        GPU memory that it had when it asked for more; 0 if that is not known.
    """

    need_bytes = 0


class FitDied(RunError):
    """A child ended without a reply: killed by a signal, exited, or past its deadline."""


class FitCancelled(FitDied):
    """The caller had the child killed: nobody wants the result."""


class FitKilled(FitDied):
    """Somebody else killed a child (SIGKILL, SIGTERM): the same call may work again.

    Attributes
    ----------
    for_memory : bool
        Whether it was the kernel, for want of memory: then it may well happen again.
    """

    for_memory = False


class ForkServerDied(FitDied):
    """The fork server ended and took the child with it: the same call may work again."""


class CheckpointError(RunError):
    """A checkpoint is missing or damaged."""
