"""What a child that is kept gathers, and what it costs to look: python benchmarks/kept_process.py.

One child of the built-in app trains (and evaluates, where the config says so) one client after the
other, 300 fits. After each one it is compared with what it was after the first, as it is with
`isolation.fits_per_process: auto`; here it is kept in any case. Prints how its memory differed from
the baseline, which is what the tolerance of `fedhpc.isolation.cleanliness` must cover, what else
was found, and how long looking took.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import submitting

from fedhpc.isolation import ChildPool, PoolOptions, Slot, channel
from fedhpc.isolation.calls import DEFAULT_PRELOAD
from fedhpc.isolation.cleanliness import MB, Cleanliness

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
FIT = "fedhpc.federation.fit"


# --- in the child ---

_cleanliness: Cleanliness | None = None


def fit(work: memoryview, *blobs: memoryview) -> list[list[bytes]]:
    """Train, look, and return what was seen."""
    global _cleanliness
    from fedhpc.federation import fit
    from fedhpc.isolation import cleanliness, host_memory

    if _cleanliness is None:
        _cleanliness = Cleanliness()
    began_s = time.process_time()
    fit.run(work, *blobs)
    trained_s = time.process_time()
    changes = _cleanliness.changes()
    looked_s = time.process_time()
    status = cleanliness._status()
    counted = sum(1024 * int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
    seen = {
        "fit_ms": 1000 * (trained_s - began_s),
        "look_ms": 1000 * (looked_s - trained_s),
        "changes": changes,
        "counted": counted,
        "exact": host_memory.own_bytes(),
    }
    return [[json.dumps(seen).encode()]]


# --- the pool's side ---


def messages(run_dir: Path) -> list[list[bytes]]:
    """Return a request for each client of a run, and its blob."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

    from fedhpc.federation import compat, grid_pb2, seeds
    from fedhpc.federation.experiment import Experiment
    from fedhpc.federation.payload import Encodings, pack

    experiment = Experiment(run_dir)
    compat.set_identity(run_dir.name)
    arrays = ArrayRecord(experiment.new_model().state_dict())
    cache = Encodings()
    verbs = ["train", "evaluate"] if experiment.config.federation.clients_per_evaluation else []
    found = []
    for client_id, verb in itertools.product(
        range(experiment.config.federation.num_clients), verbs or ["train"]
    ):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
        message = Message(content, dst_node_id=client_id + 1, message_type=verb)
        message_id = f"1-{client_id}-{verb}-0"
        compat.set_message_id(message, message_id)
        packed = pack(message, None, cache)
        packed.payload.client_id = client_id
        packed.payload.seed = seeds.derive(0, 1, client_id, verb, 0)
        work = grid_pb2.Work(message_id=message_id, payload=packed.payload.SerializeToString())
        work.blobs.extend(grid_pb2.Blob(digest=b.digest, size=b.size) for b in packed.blobs)
        found.append([work.SerializeToString(), *(b"".join(blob.parts) for blob in packed.blobs)])
    return found


def make_run(folder: Path, config: Path, sets: list[str]) -> Path:
    """Return the folder of a run of one round: with it come config, data and partitions."""
    return submitting.federate(config, [*sets, "federation.num_rounds=1"], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIGS / "digits.yaml")
    parser.add_argument("--fits", type=int, default=300)
    parser.add_argument("--set", action="append", default=[], help="as of fedhpc submit")
    options = parser.parse_args()
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = make_run(Path(folder), options.config, options.set)
        pool_options = PoolOptions(
            fits_per_process=0,
            preload=[*DEFAULT_PRELOAD, "flwr.clientapp", FIT, "fedhpc.federation.client_app"],
            prepare=f"{FIT}:prepare", prepare_arg=str(run_dir), prepare_early=True,
        )  # fmt: skip
        seen = []
        with ChildPool(pool_options) as pool:
            for buffers in itertools.islice(itertools.cycle(messages(run_dir)), options.fits):
                fds = [channel.write_memory([buffer]) for buffer in buffers]
                reply = pool.run("kept_process:fit", fds, slot=Slot(0), timeout_s=120)
                seen.append(json.loads(bytes(channel.view(reply.buffers[0]))))
                channel.close_all(fds)
                reply.close()
    first, rest = seen[0], seen[1:]
    print(f"{len(seen)} fits of {options.config.name} in one process")
    for name in ("counted", "exact"):
        more = sorted((line[name] - first[name]) / MB for line in rest)
        print(
            f"  memory, {name}: {first[name] / MB:.1f} MB after the first fit, then"
            f" {more[0]:+.1f} to {more[-1]:+.1f}, median {statistics.median(more):+.1f},"
            f" after the last {(rest[-1][name] - first[name]) / MB:+.1f}"
        )
    looks = sorted(line["look_ms"] for line in rest)
    fits = statistics.median(line["fit_ms"] for line in rest)
    print(
        f"  CPU of a look: median {statistics.median(looks):.2f} ms, at most {looks[-1]:.2f};"
        f" of the first {first['look_ms']:.0f}; a fit {fits:.1f} ms"
    )
    changed = [f"fit {n}: {'; '.join(line['changes'])}" for n, line in enumerate(seen, 1)
               if line["changes"]]  # fmt: skip
    print("  changes:", *(changed[:5] or ["none"]), sep="\n    ")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main()
