"""The one place that touches what Flower keeps internal. Written against flwr 1.41."""

import hashlib
from collections.abc import Callable, MutableMapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.client.mod.utils import make_ffn
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import (
    array_record_from_proto,
    config_record_from_proto,
    recorddict_from_proto,
    recorddict_to_proto,
)
from flwr.common.serde_utils import (
    error_from_proto,
    error_to_proto,
    metadata_from_proto,
    metadata_to_proto,
    record_value_dict_from_proto,
)
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import ArrayRecord as ProtoArrayRecord
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp.strategy import FedAvg, Strategy
from flwr.serverapp.strategy.strategy_utils import (
    aggregate_arrayrecords,
    aggregate_metricrecords,
    validate_message_reply_consistency,
)
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["Run", "apply_mods", "make_error_reply", "read_app_folder", "set_identity"]

R = TypeVar("R", ArrayRecord, MetricRecord)


def flower_run_id(run_id: str) -> int:
    """Return the run id as Flower has it: a positive 63-bit number."""
    return int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:8]) >> 1


def set_identity(run_id: str) -> None:
    """Tell Flower which run this process serves, so that `Message` can be built in a ServerApp."""
    TaskIdentity.task_id = 0
    TaskIdentity.run_id = flower_run_id(run_id)
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def empty_run(run_id: str) -> Run:
    """Return Flower's description of the run."""
    return Run.create_empty(flower_run_id(run_id))


def set_message_id(message: Message, message_id: str) -> None:
    """Give an outgoing message its id, as Flower's SuperLink would."""
    message.metadata.__dict__["_message_id"] = message_id


def make_error_reply(message: Message, reason: str, *, raised: bool) -> Message:
    """Return the reply that says a client failed.

    Parameters
    ----------
    message : Message
        What was asked of the client.
    reason : str
        Why there is no result.
    raised : bool
        Whether the app raised it, or the process died.
    """
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION if raised else ErrorCode.CLIENT_APP_CRASHED
    return Message(Error(code=code, reason=reason), reply_to=message)


def content_to_bytes(records: RecordDict) -> bytes:
    """Encode a message's content, as a part of the message."""
    return ProtoMessage(content=recorddict_to_proto(records)).SerializeToString()


def message_to_bytes(message: Message, content: bytes) -> bytes:
    """Encode a message whose content is encoded already; b"" if it has an error in its place."""
    bare = ProtoMessage(
        metadata=metadata_to_proto(message.metadata),
        error=error_to_proto(message.error) if message.has_error() else None,
    )
    return bare.SerializeToString() + content  # fields may come in any order


def message_from_bytes(data: bytes) -> Message:
    """Decode a message; its ArrayRecords are not to be changed, only replaced.

    They are those of other messages with the same ones, as to decode them takes most of the time,
    and a cohort's replies all have the same names, types and shapes (and no data: see `payload`).
    """
    encoded = ProtoMessage.FromString(data)
    content: RecordDict | None = None
    if encoded.HasField("content"):
        content = RecordDict()
        for item in encoded.content.items:
            content[item.key] = _record(item)
    error = error_from_proto(encoded.error) if encoded.HasField("error") else None
    return make_message(metadata_from_proto(encoded.metadata), content, error)


def _record(item: ProtoRecordDict.Item) -> ArrayRecord | MetricRecord | ConfigRecord:
    if item.HasField("array_record"):
        return _array_record(item.array_record.SerializeToString())
    if item.HasField("config_record"):
        return config_record_from_proto(item.config_record)
    if not item.HasField("metric_record"):
        raise ValueError(
            f"record '{item.key}': expected arrays, metrics or a config, found another"
        )
    protos = {one.key: one.value for one in item.metric_record.items}
    # Not value by value: each would be checked, though protobuf holds nothing else.
    return _holding(MetricRecord(), record_value_dict_from_proto(protos))


@lru_cache(maxsize=16)
def _array_record(encoded: bytes) -> ArrayRecord:
    return array_record_from_proto(ProtoArrayRecord.FromString(encoded))


def records_to_bytes(records: RecordDict) -> bytes:
    """Encode a RecordDict."""
    return recorddict_to_proto(records).SerializeToString()


def records_from_bytes(data: bytes) -> RecordDict:
    """Decode a RecordDict."""
    return recorddict_from_proto(ProtoRecordDict.FromString(data))


def without_data(arrays: ArrayRecord) -> ArrayRecord:
    """Return the same names, types and shapes, with no data; others share it: do not change it."""
    return _without_data(
        tuple((key, a.dtype, tuple(a.shape), a.stype) for key, a in arrays.items())
    )


@lru_cache(maxsize=16)
def _without_data(described: tuple[tuple[str, str, tuple[int, ...], str], ...]) -> ArrayRecord:
    return ArrayRecord(
        {key: Array(dtype, shape, stype, b"") for key, dtype, shape, stype in described}
    )


def record_over(arrays: MutableMapping[str, Array]) -> ArrayRecord:
    """Return a record that holds arrays in this mapping, in place of a dict of its own."""
    return _holding(ArrayRecord(), arrays)


def _holding(record: R, values: MutableMapping[str, Any]) -> R:
    record.__dict__["_data"] = values
    return record


def mapping_in(record: ArrayRecord) -> MutableMapping[str, Array]:
    """Return the mapping that a record holds its arrays in."""
    found: MutableMapping[str, Array] = record.__dict__["_data"]
    return found


def skeleton_to_bytes(arrays: ArrayRecord) -> bytes:
    """Encode names, types and shapes of arrays; the record is called "arrays"."""
    return records_to_bytes(RecordDict({"arrays": without_data(arrays)}))


def apply_mods(app: ClientApp, mods: list[Mod]) -> Callable[..., Message]:
    """Return the app with mods around it, the first one outermost."""
    return make_ffn(app, mods)


def read_app_folder(folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Read a Flower app's pyproject.toml.

    Returns
    -------
    components : dict
        ``serverapp`` and ``clientapp``, "module:attribute" each.
    run_config : dict
        Its default run config, flattened.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is none, or Flower finds it invalid.
    """
    # It loads an HTTP client: 50 ms of the start of each process that needs none of it.
    from flwr.common.config import flatten_dict, get_project_config

    app = get_project_config(folder)["tool"]["flwr"]["app"]
    return app["components"], flatten_dict(app.get("config", {}))


def replace_strategy_start(loop: Callable[..., Any]) -> None:
    """Make every strategy that does not override ``start`` run this loop instead of Flower's."""
    Strategy.start = loop  # type: ignore[method-assign]


def averages_metrics(strategy: FedAvg) -> bool:
    """Return whether a strategy's metrics of training are Flower's weighted mean."""
    return strategy.train_metrics_aggr_fn is aggregate_metricrecords


def check_consistency(replies: list[RecordDict], weighted_by: str) -> None:
    """Check what FedAvg checks before it averages; the data of arrays are not read.

    Raises
    ------
    InconsistentMessageReplies
        Flower's, as it says it.
    """
    validate_message_reply_consistency(replies, weighted_by, check_arrayrecord=True)


def weighted_mean(replies: list[RecordDict], weighted_by: str) -> RecordDict:
    """Return the mean of replies as FedAvg makes it, with their total weight.

    Parameters
    ----------
    replies : list of RecordDict
        Each with one ArrayRecord and one MetricRecord.
    weighted_by : str
        The metric that is the weight.
    """
    (arrays_key,) = replies[0].array_records
    (metrics_key,) = replies[0].metric_records
    weights: list[Any] = [reply.metric_records[metrics_key][weighted_by] for reply in replies]
    metrics = MetricRecord({weighted_by: sum(weights)})
    metrics.update(aggregate_metricrecords(replies, weighted_by))
    arrays = aggregate_arrayrecords(replies, weighted_by)
    return RecordDict({arrays_key: arrays, metrics_key: metrics})
