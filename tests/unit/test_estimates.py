"""How long fits are expected to take, compared with each other."""

import numpy as np
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from fedhpc.federation import compat
from fedhpc.federation.conventions import examples_of
from fedhpc.federation.estimates import Estimates


def test_nothing_is_expected_where_nothing_is_known() -> None:
    assert Estimates().expected("train", 3) == 0.0


def test_a_clients_own_fits_count_and_the_newest_most() -> None:
    estimates = Estimates()
    for client_id, seconds in {0: 4.0, 1: 1.0, 2: 2.0}.items():
        estimates.note("train", client_id, seconds, 0, None)
    longest_first = sorted(range(3), key=lambda client: -estimates.expected("train", client))
    assert longest_first == [0, 2, 1]
    for _ in range(3):
        estimates.note("train", 1, 9.0, 0, None)
    assert estimates.expected("train", 1) > estimates.expected("train", 0)


def test_a_client_that_nobody_knows_is_expected_to_be_like_the_mean() -> None:
    estimates = Estimates()
    estimates.note("train", 0, 4.0, 0, 400)
    estimates.note("train", 1, 1.0, 0, 100)
    assert estimates.expected("train", 2) == 250.0
    assert estimates.expected("evaluate", 0) == 0.0


def test_a_slow_array_task_does_not_make_its_clients_longer() -> None:
    estimates = Estimates()
    # Array task 1 is five times slower; clients 0 to 4 have 100 to 500 examples.
    for client_id, array_task in enumerate([1, 0, 1, 0, 0]):
        examples = 100 * (client_id + 1)
        estimates.note(
            "train", client_id, examples / 100 * (5 if array_task else 1), array_task, examples
        )
    expected = [estimates.expected("train", client_id) for client_id in range(5)]
    np.testing.assert_allclose(expected, [100, 200, 300, 400, 500])


def test_a_client_that_takes_longer_than_its_examples_say_is_expected_to() -> None:
    estimates = Estimates()
    for client_id in range(4):
        estimates.note("train", client_id, 3.0 if client_id == 2 else 1.0, 0, 100)
    expected = [estimates.expected("train", client_id) for client_id in range(4)]
    assert expected[2] == pytest.approx(3 * expected[0])


def test_a_fit_that_took_no_time_is_no_error() -> None:
    estimates = Estimates()
    estimates.note("train", 0, 0.0, 0, None)
    assert estimates.expected("train", 0) == 0.0


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [({"num-examples": 7}, 7.0), ({"num-examples": [1, 2]}, None), ({"loss": 1.0}, None)],
)
def test_the_number_of_examples_is_read_where_flowers_clients_say_it(
    metrics: dict[str, float], expected: float | None
) -> None:
    compat.set_identity("test")
    content = RecordDict({"arrays": ArrayRecord(), "metrics": MetricRecord(metrics)})
    reply = Message(content, dst_node_id=1, message_type="train")
    assert examples_of(reply) == expected
