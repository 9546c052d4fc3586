"""What a checkpoint holds of a strategy: enough for a new one to go on, bit by bit."""

import functools
import gc
import json
import logging
import random
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedhpc.federation import compat, plain, seeds, strategies
from fedhpc.federation.plain import CannotEncode, Encoded
from fedhpc.federation.strategy_state import StrategyState

CLIENTS, COHORT, ROUNDS, STOP = 8, 6, 5, 3
SIZES: dict[str, Any] = {
    "fraction_train": COHORT / CLIENTS, "min_train_nodes": COHORT,
    "min_available_nodes": CLIENTS, "fraction_evaluate": 0.0,
}  # fmt: skip
CLIPPED = {"noise_multiplier": 0.3, "num_sampled_clients": COHORT}


def make(name: str) -> Strategy:
    cls = getattr(flower, name)
    made: Strategy
    if name.startswith("DifferentialPrivacy"):
        more = {} if "Adaptive" in name else {"clipping_norm": 0.5}
        made = cls(strategy=flower.FedAdam(**SIZES), **CLIPPED, **more)
        return made
    if name == "FedXgbCyclic":
        made = cls(fraction_train=1.0, fraction_evaluate=0.0)
        return made
    more = {"client_learning_rate": 0.1} if name == "QFedAvg" else {}
    more |= {"server_momentum": 0.9, "server_learning_rate": 0.5} if name == "FedAvgM" else {}
    made = cls(**SIZES, **more)
    return made


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Flower collects garbage with every record that it converts: let it find little to look at."""
    gc.freeze()
    yield
    gc.unfreeze()


class Nodes:
    def get_node_ids(self) -> list[int]:
        return list(range(1, CLIENTS + 1))


def first_arrays(name: str) -> ArrayRecord:
    if "FedXgb" in name:
        return ArrayRecord({"0": Array(np.frombuffer(b"", dtype=np.uint8))})
    rng = np.random.default_rng(0)
    return ArrayRecord(
        {"w": Array(rng.normal(size=(5, 3))), "b": Array(rng.normal(size=3).astype(np.float32))}
    )


def reply(message: Message, server_round: int) -> Message:
    """Return what a client answers: derived from what it was sent and from its own seed."""
    node = message.metadata.dst_node_id
    rng = np.random.default_rng(1000 * server_round + node)
    (sent,) = message.content.array_records.values()
    if "0" in sent:
        trees = [{"id": 0, "n": node, "round": server_round}]
        model = {"gbtree_model_param": {"num_parallel_tree": "1", "num_trees": "1"}, "trees": trees}
        model |= {"iteration_indptr": [0, 1], "tree_info": [0]}
        text = json.dumps({"learner": {"gradient_booster": {"model": model}}}).encode()
        arrays = ArrayRecord({"0": Array(np.frombuffer(text, dtype=np.uint8))})
    else:
        arrays = ArrayRecord(
            {k: Array((a.numpy() + rng.normal(size=a.shape)).astype(a.numpy().dtype))
             for k, a in sent.items()}
        )  # fmt: skip
    metrics = {"num-examples": node, "train_loss": float(rng.random()), "norm_bit": node % 2}
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
    return Message(content, reply_to=message)


def rounds(
    strategy: Strategy, arrays: ArrayRecord, config: ConfigRecord, first: int, last: int
) -> ArrayRecord:
    for server_round in range(first, last + 1):
        seeds.seed_all(seeds.derive(7, server_round, "configure"))
        messages = list(strategy.configure_train(server_round, arrays, config, Nodes()))  # type: ignore[arg-type]
        seeds.seed_all(seeds.derive(7, server_round, "aggregate"))
        replies = [reply(message, server_round) for message in messages]
        new, _ = strategy.aggregate_train(server_round, replies)
        assert new is not None
        arrays = new
    return arrays


def bits(arrays: ArrayRecord) -> dict[str, bytes]:
    return {key: array.data for key, array in arrays.items()}


def through_json(changed: dict[str, Encoded]) -> dict[str, Encoded]:
    """Return what reading it from a disk gives."""
    return {
        path: Encoded(json.loads(json.dumps(encoded.plain)), [bytes(b) for b in encoded.buffers])
        for path, encoded in changed.items()
    }


@pytest.mark.parametrize("name", sorted(strategies.known()))
def test_a_new_strategy_goes_on_bit_by_bit_from_what_was_kept_of_the_old_one(name: str) -> None:
    compat.set_identity("test")
    undisturbed = rounds(make(name), first_arrays(name), ConfigRecord(), 1, ROUNDS)

    stopped, config = make(name), ConfigRecord()
    state = StrategyState(stopped)
    arrays = rounds(stopped, first_arrays(name), config, 1, STOP)
    kept = through_json(state.changed())
    assert state.unknown == set()

    fresh = make(name)
    StrategyState(fresh).restore(kept)
    resumed = rounds(fresh, arrays, config, STOP + 1, ROUNDS)
    assert bits(resumed) == bits(undisturbed)


def test_this_would_notice_a_lost_state() -> None:
    """The momentum of FedAdam, not restored, gives another model: the test above can fail."""
    compat.set_identity("test")
    undisturbed = rounds(make("FedAdam"), first_arrays(""), ConfigRecord(), 1, ROUNDS)
    arrays = rounds(make("FedAdam"), first_arrays(""), ConfigRecord(), 1, STOP)
    assert bits(rounds(make("FedAdam"), arrays, ConfigRecord(), STOP + 1, ROUNDS)) != bits(
        undisturbed
    )


class Own:
    """A strategy as an app may have it."""

    def __init__(self) -> None:
        self.total_rounds = 10
        self.rng = np.random.default_rng(3)
        self.dice = random.Random(3)
        self.seen: Counter[int] = Counter()
        self.recent: deque[float] = deque(maxlen=None)
        self.best = float("-inf")
        self.nodes: set[int] = set()
        self.tensor = torch.zeros(3)
        self.weights = {"a": np.zeros(2, dtype=np.float32)}
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
        self.function = functools.partial(max, 3)
        self.log = logging.getLogger("x")
        self.lock = threading.Lock()
        self.me = self

    def step(self) -> None:
        self.seen[self.dice.randrange(5)] += 1
        self.recent.append(self.rng.random())
        self.best = max(self.best, self.recent[-1])
        self.nodes.add(self.dice.randrange(100))
        self.tensor += 1  # in place
        self.weights["a"] += 0.5
        (parameter,) = self.optimizer.param_groups[0]["params"]
        parameter.grad = torch.ones(2)
        self.optimizer.step()

    def picture(self) -> object:
        buffer = self.optimizer.state_dict()["state"][0]["momentum_buffer"].tolist()
        return (self.seen, list(self.recent), self.best, self.nodes, self.tensor.tolist(),
                self.weights["a"].tolist(), buffer)  # fmt: skip


def test_what_a_strategy_of_an_app_gathers_is_kept_and_what_it_never_changed_is_not() -> None:
    old = Own()
    state = StrategyState(old)
    for _ in range(4):
        old.step()
    kept = through_json(state.changed())
    assert "total_rounds" not in kept  # the config of a resumed run may say another number
    assert state.unknown == set()
    new = Own()
    new.total_rounds = 20
    StrategyState(new).restore(kept)
    for strategy in (old, new):
        strategy.step()
    assert new.picture() == old.picture()
    assert new.total_rounds == 20


def test_a_later_change_does_not_reach_what_was_kept() -> None:
    old = Own()
    state = StrategyState(old)
    old.step()
    kept = state.changed()
    old.step()
    new = Own()
    StrategyState(new).restore(kept)
    assert new.weights["a"].tolist() == [0.5, 0.5]


class Phase(Enum):
    FIRST = 1
    SECOND = 2


class Mapping(dict[str, int]):
    """A container of its own type."""


def test_an_attribute_that_cannot_be_kept_is_named() -> None:
    class Odd:
        def __init__(self) -> None:
            self.objects = [object()]
            self.own = Mapping(a=1)
            self.half = torch.zeros(2, dtype=torch.bfloat16)
            self.phase = Phase.FIRST
            self.other = Phase.FIRST
            self.when = datetime.now(UTC)
            self.path = Path("x")
            self.fine = 1

    odd = Odd()
    state = StrategyState(odd)
    odd.phase = Phase.SECOND
    assert state.changed() == {}
    assert state.unknown == {
        "objects (list)", "own (Mapping)", "half (Tensor)", "phase (Phase)", "when (datetime)",
    }  # fmt: skip


def test_an_object_that_is_made_late_is_told_apart() -> None:
    late = Own()
    late.optimizer = None  # type: ignore[assignment]
    state = StrategyState(late)
    assert state.changed() == {}
    assert state.lazy == set()
    late.optimizer = Own().optimizer
    late.optimizer.param_groups[0]["lr"] = 0.2
    state.changed()
    assert state.lazy == {"optimizer"}


@pytest.mark.parametrize(
    "value",
    [
        None, True, 3, 2**70, 0.1, float("inf"), "text", b"\x00bytes", (1, [2, {"a": (3,)}]),
        {1: "int key", (2, "x"): None}, OrderedDict(b=1, a=2), Counter("hello"), {3, 1, 2},
        frozenset("ab"), deque([1, 2]), np.float32(0.1), np.int64(5),
        {"$": "a key of our own"},
        MetricRecord({"int": 2**64 - 1, "float": float("inf"), "list": [0.1, 2.0], "empty": []}),
        ConfigRecord({"bool": True, "int": 1, "text": "a", "bytes": b"\x00", "list": [b"\x00"]}),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_come_back_as_they_were(value: Any) -> None:
    (back,) = through_json({"": plain.encode(value)}).values()
    found = plain.decode(back)
    assert type(found) is type(value)
    assert found == value


def test_values_of_records_come_back_as_clients_get_them() -> None:
    class Mode(str, Enum):  # noqa: UP042  (str() of one is its name)
        FAST = "fast"

    class Level(IntEnum):
        LOW = 1

    record = ConfigRecord({"mode": Mode.FAST, "level": Level.LOW, "rate": np.float64(0.5)})
    found = plain.decode(plain.encode(record))
    assert found == compat.records_from_bytes(compat.records_to_bytes(RecordDict({"": record})))[""]
    assert [type(value) for value in found.values()] == [str, int, float]


@pytest.mark.parametrize("dtype", ["<f4", "<f8", "<i8", "|b1", "<U3", "<c16"])
def test_arrays_come_back_with_their_type_shape_and_bits(dtype: str) -> None:
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))
    found = plain.decode(plain.encode(array))
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("value", [object(), np.array([object()]), [1, {"a": object()}]])
def test_what_is_not_known_is_refused(value: object) -> None:
    with pytest.raises(CannotEncode):
        plain.encode(value)
