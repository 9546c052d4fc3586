"""One fit: what a child process does with a message for a client.

`fedhpc.isolation` calls `prepare` and `run` by name; the debug executor calls `execute`.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedhpc import config
from fedhpc.federation import apps, compat, grid_pb2, groups, seeds, updates
from fedhpc.federation.payload import Blob, BytesLike, Encodings, pack, unpack
from fedhpc.files import write_atomic
from fedhpc.isolation.devices import device_of_this_child
from fedhpc.paths import RunPaths

_REHEARSALS = 12
_REHEARSAL_S = 0.15  # then no other one begins


@dataclass(frozen=True)
class Prepared:
    """What every fit of a run needs."""

    config: config.Config
    paths: RunPaths
    spec: apps.AppSpec
    app: apps.ClientCallable


_prepared: Prepared | None = None


def load(run_dir: str) -> Prepared:
    """Load the run's config and its ClientApp."""
    paths = RunPaths(Path(run_dir))
    resolved = config.load(paths.config)
    spec = apps.locate(resolved, paths)
    compat.set_identity(paths.run_id)
    return Prepared(resolved, paths, spec, apps.load_client(spec))


def prepare(run_dir: str) -> None:
    """Make this process ready for `run`. Touches no CUDA unless the app's import does."""
    global _prepared
    prepared = load(run_dir)
    if prepared.config.app.is_builtin:
        from fedhpc.federation import experiment

        experiment.open_experiment(run_dir).warm_up()
    _prepared = prepared


def rehearse(run_dir: str) -> None:
    """Answer a message with the built-in app, for what is set up in the first calls of all.

    The kernels and buffers of torch are, at once; the interpreter adapts code that has run a dozen
    times. Nothing comes of it: each fit loads its own weights and seeds its own random numbers.
    """
    from fedhpc.federation import client_app
    from fedhpc.federation.experiment import open_experiment

    experiment, paths = open_experiment(run_dir), RunPaths(Path(run_dir))
    spec = apps.locate(experiment.config, paths)
    compat.set_identity(paths.run_id)
    # Without mods, which may not be imported here.
    prepared = Prepared(experiment.config, paths, spec, client_app.app)
    with experiment.rehearsing():
        arrays = ArrayRecord(experiment.new_model().state_dict())
        content = RecordDict({"arrays": arrays, "config": ConfigRecord()})
        message = Message(content, dst_node_id=1, message_type="train")
        compat.set_message_id(message, "rehearsal")
        packed = pack(message, None, Encodings())
        packed.payload.inline_bytes = sys.maxsize
        work = grid_pb2.Work(payload=packed.payload.SerializeToString())
        views = {blob.digest: memoryview(b"".join(blob.parts)) for blob in packed.blobs}
        # Children that are kept adapt their code themselves.
        repeats = _REHEARSALS if experiment.config.isolation.fits_per_process == 1 else 1
        deadline_s = time.monotonic() + _REHEARSAL_S
        for _ in range(repeats):
            execute(prepared, work, views)
            if time.monotonic() > deadline_s:
                break


def run(work: memoryview, *blobs: memoryview) -> list[Sequence[BytesLike]]:
    """Answer a message: the entry that children are called with.

    Parameters
    ----------
    work : memoryview
        A `grid_pb2.Work`.
    *blobs : memoryview
        Its blobs, in their order.

    Returns
    -------
    list
        A `grid_pb2.Result`, then the bytes of those of its blobs that are not in files.
    """
    assert _prepared is not None  # noqa: S101  (the pool calls prepare first)
    device_of_this_child()  # a GPU that torch cannot use is an error for every app
    request = grid_pb2.Work.FromString(bytes(work))
    views = {blob.digest: view for blob, view in zip(request.blobs, blobs, strict=True)}
    result, inline = execute(_prepared, request, views)
    return [[result.SerializeToString()], *(blob.parts for blob in inline)]


def execute(
    prepared: Prepared, work: grid_pb2.Work, views: Mapping[str, memoryview]
) -> tuple[grid_pb2.Result, list[Blob]]:
    """Call the ClientApp for one message.

    Returns
    -------
    result : Result
        The reply, or why it cannot be used.
    inline : list of Blob
        The result's blobs that are not in files, in its order.

    Raises
    ------
    Exception
        Whatever the app raises.
    """
    payload = grid_pb2.Payload.FromString(work.payload)
    message, state = unpack(payload, views.__getitem__)
    context = apps.client_context(
        prepared.spec,
        prepared.paths.run_id,
        payload.client_id,
        prepared.config.federation.num_clients,
        state,
    )
    seeds.seed_all(payload.seed)
    is_mean = message.metadata.message_type == groups.MESSAGE_TYPE
    reply = (groups.answer if is_mean else prepared.app)(message, context)
    if not isinstance(reply, Message):
        raise TypeError(f"the ClientApp returned {type(reply).__name__}, expected a Message")
    if reply.has_content() and updates.is_train(message.metadata.message_type):
        problem = updates.non_finite(
            reply.content, lambda: unpack(payload, views.__getitem__)[0].content
        )
        if problem:
            failure = grid_pb2.Failure(reason=problem, raised=True)
            return grid_pb2.Result(message_id=work.message_id, failure=failure), []
    packed = pack(reply, context.state, Encodings())
    result = grid_pb2.Result(message_id=work.message_id, payload=packed.payload.SerializeToString())
    inline = []
    for blob in packed.blobs:
        in_file = blob.size > payload.inline_bytes
        result.blobs.add(digest=blob.digest, size=blob.size, in_file=in_file)
        if in_file:
            path = prepared.paths.result_blob(work.message_id, blob.digest)
            write_atomic(path, blob.parts)
        else:
            inline.append(blob)
    return result, inline
