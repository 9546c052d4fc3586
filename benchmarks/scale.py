"""Cost against clients, cohort, array tasks and model size: python benchmarks/scale.py.

--data FOLDER_WITH_MNIST  (default: torchvision's download)

1. The server alone. Array tasks that echo (`echo.py`) load fedhpc's server: one of clients, cohort,
   array tasks and numbers of the model is varied at a time. Printed for each: CPU of the server's
   process for each fit, time of a round, memory, bytes on the links; then the exponent b and the
   residual of a least-squares line through log(cost) = a + b log(varied), with all points and with
   the upper half.
2. Real fits: logistic regression on MNIST, 6 images a client, one array task with two slots, kept
   processes: 100 clients, all of them a round, against 10,000, 1,000 a round, in turn. Printed: CPU
   of the server's and the array task's own processes and wall time for each fit, their memory and
   how it grows with the fits, and the ratios.

Figures of a steady state: from the end of the first round to the end of the last but one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import submitting
from measured import field_of, own_cpu_s

from fedhpc.files import read_lines

HERE = Path(__file__).parent
_SLOTS = 2  # of each array task
_INTERVAL_S = 0.05
_LIMIT_S = 300.0
_BYTES = 2_000_000_000  # of replies in a cell


@dataclass(frozen=True)
class Cell:
    """What is run."""

    clients: int = 10_000
    cohort: int = 100
    array_tasks: int = 4
    numbers: int = 10_000
    real: bool = False
    wanted: int | None = None  # rounds; None: as many as show a steady state

    @property
    def rounds(self) -> int:
        """How many rounds there are."""
        if self.wanted is not None:
            return self.wanted
        if self.real:
            return max(6, 4_000 // self.cohort)
        bytes_a_round = 4 * self.numbers * self.cohort
        return max(4, min(200, 4_000 // self.cohort, _BYTES // bytes_a_round))


@dataclass(frozen=True)
class Cost:
    """What a steady state costs: seconds a fit, megabytes, bytes a fit."""

    fit_s: float
    server_cpu_s: float
    array_task_cpu_s: float
    server_mb: float
    array_task_mb: float
    server_slope: float  # MB a thousand fits, in the second half
    array_task_slope: float
    sent: float  # by the array tasks
    received: float


SWEEPS: dict[str, list[Cell]] = {
    "clients": [Cell(clients=10**k) for k in (2, 3, 4, 5, 6)],
    "cohort": [Cell(cohort=n) for n in (10, 100, 1_000, 10_000)],
    "array_tasks": [Cell(cohort=1_024, array_tasks=4**k) for k in (0, 1, 2, 3, 4, 5)],
    "numbers": [Cell(cohort=20, numbers=10**k) for k in (3, 4, 5, 6, 7)],
}
FEW = Cell(clients=100, cohort=100, array_tasks=1, real=True)
MANY = Cell(clients=10_000, cohort=1_000, array_tasks=1, real=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with MNIST/raw; default: torchvision's download")
    parser.add_argument("--sweeps", nargs="*", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--rounds", type=int, help="of each run of the sweeps")
    parser.add_argument("--repeats", type=int, default=2, help="of the real fits; 0: none")
    parser.add_argument("--fits-per-process", default="0", help="of the real fits")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores")
    for name in options.sweeps:
        _sweep(name, [replace(cell, wanted=options.rounds) for cell in SWEEPS[name]])
    if options.repeats:
        data = [f"data.source={Path(options.data).resolve()}"] if options.data else []
        data.append(f"isolation.fits_per_process={options.fits_per_process}")
        _real([(_run(FEW, data), _run(MANY, data)) for _ in range(options.repeats)])


def _sweep(name: str, cells: Iterable[Cell]) -> None:
    print(
        f"\n{name:>12} {'server CPU/fit':>15} {'wall/fit':>10} {'a round':>9} {'server':>8}"
        f" {'growth':>16} {'to server/fit':>14} {'from server/fit':>16}",
        flush=True,
    )
    found: list[tuple[float, Cost]] = []
    for cell in cells:
        cost = _run(cell, [])
        found.append((getattr(cell, name), cost))
        print(
            f"{getattr(cell, name):>12,} {1e3 * cost.server_cpu_s:>12.3f} ms"
            f" {1e3 * cost.fit_s:>7.3f} ms {cell.cohort * cost.fit_s:>7.3f} s"
            f" {cost.server_mb:>5.0f} MB {cost.server_slope:>6.2f} MB/1k fits"
            f" {cost.sent:>12,.0f} B {cost.received:>14,.0f} B",
            flush=True,
        )
    for what, value in (
        ("server CPU/fit", lambda cost: cost.server_cpu_s),
        ("wall/fit", lambda cost: cost.fit_s),
        ("server memory", lambda cost: cost.server_mb),
    ):
        print(f"  {what} ~ {name}^{_exponents(found, value)}")


def _exponents(found: Sequence[tuple[float, Cost]], value: Callable[[Cost], float]) -> str:
    x = np.log([varied for varied, _ in found])
    y = np.log([value(cost) for _, cost in found])
    said = []
    for start in (0, len(x) - max(2, (len(x) + 1) // 2)):
        (slope, intercept) = np.polyfit(x[start:], y[start:], 1)
        residual = np.sqrt(np.mean((slope * x[start:] + intercept - y[start:]) ** 2))
        said.append(f"{slope:.2f} (residual {residual:.2f})")
    return f"{said[0]}; upper half {said[1]}"


def _real(pairs: list[tuple[Cost, Cost]]) -> None:
    print(
        f"\nreal fits: {FEW.clients} clients, {FEW.cohort} a round; {MANY.clients}, {MANY.cohort}"
    )
    rows: list[tuple[str, float, Callable[[Cost], float]]] = [
        ("wall/fit, ms", 1e3, lambda cost: cost.fit_s),
        ("server CPU/fit, ms", 1e3, lambda cost: cost.server_cpu_s),
        ("array task CPU/fit, ms", 1e3, lambda cost: cost.array_task_cpu_s),
        ("server, MB", 1, lambda cost: cost.server_mb),
        ("array task, MB", 1, lambda cost: cost.array_task_mb),
        ("server, MB/1k fits", 1, lambda cost: cost.server_slope),
        ("array task, MB/1k fits", 1, lambda cost: cost.array_task_slope),
    ]
    for what, factor, value in rows:
        few, many = ([factor * value(pair[i]) for pair in pairs] for i in (0, 1))
        text = f"  {what:<24} {_spread(few)}  {_spread(many)}"
        if "1k" not in what:
            text += f"  ratio {_spread([b / a for a, b in zip(few, many, strict=True)])}"
        print(text)


def _spread(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:8.2f} ({low:.2f} to {high:.2f})"


def _run(cell: Cell, sets: list[str]) -> Cost:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = _prepare(cell, sets, Path(folder))
        command = (
            ["-m", "fedhpc.client", str(run_dir), "0"]
            if cell.real
            else [str(HERE / "echo.py"), str(run_dir), str(cell.array_tasks), str(_SLOTS)]
        )
        with (run_dir / "output").open("w+") as output:
            server = _start(["-m", "fedhpc.server", str(run_dir)], output)
            with (run_dir / "bytes").open("w+") as said:
                clients = _start(command, output, said)
                samples = _watch(run_dir, (server, clients))
            output.seek(0)
            if server.returncode or clients.returncode:
                sys.exit(f"{cell} failed:\n{output.read()}")
        said_bytes = (run_dir / "bytes").read_text()
        traffic = json.loads(said_bytes.splitlines()[-1]) if not cell.real else {}
        return _cost(cell, run_dir, samples, traffic)


def _prepare(cell: Cell, sets: list[str], folder: Path) -> Path:
    sets = [
        *sets,
        f"federation.num_clients={cell.clients}",
        f"cluster.array_tasks={cell.array_tasks}",
        f"cluster.min_array_tasks={cell.array_tasks}",
        f"federation.num_rounds={cell.rounds}",
        f"federation.clients_per_round={cell.cohort}",
    ]
    if cell.real:
        config = HERE.parent / "configs" / "mnist.yaml"
        sets += ["model={name: logistic}", "isolation.slots=2", "federation.evaluate_every=0"]
        if cell.clients * 6 != 60_000:
            sizes = ", ".join(["6"] * cell.clients)
            sets.append(f"data.partitioner={{name: size, params: {{partition_sizes: [{sizes}]}}}}")
    else:
        config = HERE / "echo.yaml"
        for key, value in (
            ("cohort", cell.cohort), ("rounds", cell.rounds), ("numbers", cell.numbers),
        ):  # fmt: skip
            sets.append(f"app.run_config.{key}={value}")
    said = submitting.run(submitting.command(config, sets, folder, "--prepare"), env=_env())
    return Path(said.splitlines()[-1])


def _start(command: list[str], output: object, said: object = None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *command], stdout=said or output, stderr=output, env=_env()
    )


def _env() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


@dataclass(frozen=True)
class _Sample:
    time_s: float
    rounds: int
    cpu_s: list[float]  # of the server's and the array tasks' own processes
    mb: list[float]


def _watch(run_dir: Path, processes: Sequence[subprocess.Popen[bytes]]) -> list[_Sample]:
    """Look at server and array tasks until both have ended."""
    samples = []
    deadline_s = time.monotonic() + _LIMIT_S
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline_s:
                sys.exit(f"no end within {_LIMIT_S:.0f} s: {run_dir}")
            if all(process.returncode is None for process in processes):
                samples.append(
                    _Sample(
                        time.monotonic(),
                        _rounds_done(run_dir),
                        [own_cpu_s(process.pid) for process in processes],
                        [
                            int(field_of(f"/proc/{process.pid}/status", "VmRSS:") or 0) / 1024
                            for process in processes
                        ],
                    )
                )
            time.sleep(_INTERVAL_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return samples


def _rounds_done(run_dir: Path) -> int:
    try:
        text = (run_dir / "metrics.jsonl").read_bytes()
    except OSError:
        return 0
    return text.count(b"\n") - text.startswith(b'{"round":0,')


def _cost(cell: Cell, run_dir: Path, samples: list[_Sample], traffic: dict[str, float]) -> Cost:
    steady = [sample for sample in samples if 1 <= sample.rounds < cell.rounds]
    begin, end = steady[0], next(s for s in steady if s.rounds == steady[-1].rounds)
    fits = (end.rounds - begin.rounds) * cell.cohort
    ends_s = [line["time_s"] for line in read_lines(run_dir / "metrics.jsonl") if line["round"]]
    server_cpu_s, array_task_cpu_s = (
        (after - before) / fits for before, after in zip(begin.cpu_s, end.cpu_s, strict=True)
    )
    later = [sample for sample in steady if sample.rounds >= cell.rounds // 2]  # all is warm
    thousands = [cell.cohort * sample.rounds / 1_000 for sample in later]
    slopes = [float(np.polyfit(thousands, [s.mb[who] for s in later], 1)[0]) for who in (0, 1)]
    sent_fits = cell.rounds * cell.cohort
    return Cost(
        fit_s=(ends_s[-2] - ends_s[0]) / ((cell.rounds - 2) * cell.cohort),
        server_cpu_s=server_cpu_s,
        array_task_cpu_s=array_task_cpu_s,
        server_mb=max(sample.mb[0] for sample in samples),
        array_task_mb=max(sample.mb[1] for sample in samples),
        server_slope=slopes[0],
        array_task_slope=slopes[1],
        sent=traffic.get("sent", 0) / sent_fits,
        received=traffic.get("received", 0) / sent_fits,
    )


if __name__ == "__main__":
    main()
