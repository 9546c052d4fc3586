"""What a run costs in memory, against the clients: python benchmarks/memory.py [--data FOLDER].

MNIST with logistic regression, 10 clients a round, one array task with two slots; prints the peak
resident memory of the array task's own process and of the server's, for each number of clients.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedhpc.files import read_json

CONFIG = Path(__file__).parents[1] / "configs" / "mnist.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="folder with MNIST/raw; default: torchvision's download")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clients", type=int, nargs="*", default=[100, 2000])
    options = parser.parse_args()
    data = [f"data.source={Path(options.data).resolve()}"] if options.data else []
    for clients in options.clients:
        with tempfile.TemporaryDirectory() as folder:
            peaks = run(Path(folder), clients, [*data, f"federation.num_rounds={options.rounds}"])
        print(f"{clients:>6} clients: " + ", ".join(f"{k} {v:.0f} MB" for k, v in peaks.items()))


def run(folder: Path, clients: int, sets: list[str]) -> dict[str, float]:
    """Run a federation and return the peaks of its two long-lived processes."""
    sets = [
        *sets,
        "model={name: logistic}",
        "isolation.slots=2",
        "federation.evaluate_every=1000000",
        f"federation.num_clients={clients}",
        f"cluster.runs_dir={folder}",
    ]
    command = [sys.executable, "-m", "fedhpc.submit", str(CONFIG), "--executor", "local"]
    command += ["--follow", *(part for value in sets for part in ("--set", value))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peaks: dict[str, float] = {}
    while process.poll() is None:
        for role, file in (("array task", "client-0"), ("server", "server")):
            for record in folder.glob(f"*/jobs/{file}.json"):
                peaks[role] = max(
                    peaks.get(role, 0.0), peak_mb((read_json(record) or {}).get("pid"))
                )
        time.sleep(0.05)
    if process.returncode:
        sys.exit(process.communicate()[0])
    return peaks


def peak_mb(pid: int | None) -> float:
    """Return a process's highest resident memory so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


if __name__ == "__main__":
    main()
