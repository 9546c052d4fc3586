"""Partitions by the real partitioners of flwr-datasets."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhpc.errors import ConfigError, PlatformError
from fedhpc.learning import partitions

LABELS = np.repeat(np.arange(10), 60)  # in order of class, as many data sets are

# Every partitioner that divides labelled examples, with parameters that suit 20 clients.
DISJOINT: dict[str, dict[str, Any]] = {
    "iid": {},
    "dirichlet": {"alpha": 0.5, "min_partition_size": 2},
    "shard": {"num_shards_per_partition": 2},
    "pathological": {"num_classes_per_partition": 2, "class_assignment_mode": "deterministic"},
    "linear": {},
    "size": {"partition_sizes": [30] * 20},
    "inner_dirichlet": {"partition_sizes": [30] * 20, "alpha": 0.5},
    "continuous": {"strictness": 0.8},
    "distribution": {
        "distribution_array": [[1.0, 2.0, 3.0, 4.0]] * 10,
        "num_unique_labels_per_partition": 2,
        "preassigned_num_samples_per_label": 3,
    },
}


def problem(name: str, params: dict[str, Any], clients: int = 20) -> str:
    with pytest.raises(ConfigError) as caught:
        partitions.make(LABELS, clients, name, params, 0)
    assert caught.value.source == "data.partitioner"
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize("name", DISJOINT)
def test_every_partitioner_divides_the_rows_without_overlap(name: str) -> None:
    made = partitions.make(LABELS, 20, name, DISJOINT[name], 3)
    assert len(made) == 20
    assert all(rows.dtype == np.int64 and len(rows) > 0 for rows in made)
    rows = np.concatenate(made)
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(LABELS)


@pytest.mark.parametrize("name", DISJOINT)
def test_the_same_seed_gives_the_same_partitions_and_another_seed_others(name: str) -> None:
    first, again, other = (
        np.concatenate(partitions.make(LABELS, 20, name, DISJOINT[name], seed))
        for seed in (5, 5, 2**63 - 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize(("name", "clients"), [("square", 5), ("exponential", 3)])
def test_partitioners_of_steeply_growing_sizes_divide_all_rows_between_few_clients(
    name: str, clients: int
) -> None:
    made = partitions.make(LABELS, clients, name, {}, 0)
    sizes = [len(rows) for rows in made]
    assert sorted(np.concatenate(made)) == list(range(len(LABELS)))
    assert sizes == sorted(set(sizes))
    assert "that are not greater than 0" in problem(name, {}, clients=20)


def test_iid_mixes_the_classes_though_the_rows_are_in_order_of_class() -> None:
    for rows in partitions.make(LABELS, 4, "iid", {}, 0):
        assert len(np.unique(LABELS[rows])) == 10


def test_rows_point_into_the_labels_that_were_given() -> None:
    params = {"num_classes_per_partition": 1, "class_assignment_mode": "deterministic"}
    made = partitions.make(LABELS, 10, "pathological", params, 0)
    for client_id, rows in enumerate(made):
        assert set(LABELS[rows]) == {client_id}


@pytest.mark.parametrize(
    "name", ["dirichlet", "Dirichlet", "DirichletPartitioner", "DIRICHLETPARTITIONER"]
)
def test_a_partitioner_goes_by_its_short_or_its_class_name_in_any_case(name: str) -> None:
    params = {"alpha": 1.0}
    np.testing.assert_array_equal(
        np.concatenate(partitions.make(LABELS, 5, name, params, 0)),
        np.concatenate(partitions.make(LABELS, 5, "dirichlet", params, 0)),
    )


@pytest.mark.parametrize(
    "name", ["inner_dirichlet", "inner-dirichlet", "InnerDirichletPartitioner", "innerdirichlet"]
)
def test_a_name_of_two_words_may_be_written_in_each_usual_way(name: str) -> None:
    partitions.check(name, {"partition_sizes": [1, 2], "alpha": 1.0}, 2)


def test_values_of_the_user_win_over_those_that_are_filled_in() -> None:
    chosen = partitions.make(LABELS, 5, "dirichlet", {"alpha": 1.0, "seed": 9}, 0)
    filled = partitions.make(LABELS, 5, "dirichlet", {"alpha": 1.0}, 0)
    assert [len(rows) for rows in chosen] != [len(rows) for rows in filled]


def test_the_classes_themselves_can_be_the_clients() -> None:
    made = partitions.make(LABELS, 10, "natural_id", {}, 0)
    assert [set(LABELS[rows]) for rows in made] == [{label} for label in range(10)]


def test_an_unknown_partitioner_is_refused_with_the_nearest_and_all_valid_ones() -> None:
    message = problem("dirichlett", {})
    assert "name: expected a partitioner of flwr-datasets, found 'dirichlett'" in message
    assert "; did you mean dirichlet?" in message
    assert "Hint: valid names: continuous, dirichlet, distribution, exponential," in message
    assert "vertical" not in message
    assert "found 'VerticalEvenPartitioner'" in problem("VerticalEvenPartitioner", {})
    assert "found 'Partitioner'" in problem("Partitioner", {})


def test_an_unknown_parameter_is_refused_with_the_valid_ones() -> None:
    message = problem("dirichlet", {"alpha": 1.0, "min_size": 2})
    assert "params.min_size: dirichlet has no such parameter" in message
    assert "Hint: valid parameters of dirichlet: num_partitions, partition_by, alpha," in message


def test_a_missing_parameter_is_refused_with_the_valid_ones() -> None:
    message = problem("pathological", {})
    assert "params.num_classes_per_partition: pathological needs a value, found none" in message
    assert "Hint: valid parameters of pathological: num_partitions," in message


def test_values_that_the_partitioner_refuses_come_with_its_own_words() -> None:
    assert "params: dirichlet: Alpha values should be strictly" in problem(
        "dirichlet", {"alpha": -1.0}
    )
    assert "params: dirichlet: The given alpha format" in problem("dirichlet", {"alpha": "much"})
    assert "is greater than the number of unique classes" in problem(
        "pathological", {"num_classes_per_partition": 11}
    )
    assert "params: dirichlet:" in problem("dirichlet", {"alpha": 1.0, "partition_by": "user"})


def test_partitions_that_are_not_one_a_client_are_refused() -> None:
    assert (
        "params: expected a partition for each of 20 clients, found 10 from natural_id"
        in problem("natural_id", {})
    )
    assert "for each of 20 clients, found 5 from iid" in problem("iid", {"num_partitions": 5})


def test_clients_left_without_examples_are_counted_and_named() -> None:
    message = problem("dirichlet", {"alpha": 0.01, "min_partition_size": 0}, clients=100)
    assert "params: dirichlet leaves " in message
    assert " of 100 clients without examples: " in message
    assert ", ...\n  Hint: use fewer clients or other parameters" in message


def test_more_clients_than_examples_are_refused() -> None:
    message = problem("iid", {}, clients=601)
    assert (
        "num_partitions: expected at most one client an example (600), found 601 clients" in message
    )


def test_check_needs_no_data_and_finds_the_same_mistakes() -> None:
    partitions.check("dirichlet", {"alpha": 1.0}, 10)
    for name, params in (("dirichlett", {}), ("dirichlet", {}), ("dirichlet", {"alpha": -1.0})):
        with pytest.raises(ConfigError):
            partitions.check(name, params, 10)


def test_saved_partitions_come_back_whole_and_one_by_one(tmp_path: Path) -> None:
    made = partitions.make(LABELS, 20, "dirichlet", {"alpha": 0.5, "min_partition_size": 1}, 0)
    path = tmp_path / "partitions.npz"
    partitions.save(path, made)
    loaded = partitions.load(path)
    assert len(loaded) == 20
    for client_id, rows in enumerate(made):
        np.testing.assert_array_equal(loaded[client_id], rows)
        np.testing.assert_array_equal(partitions.load_one(path, client_id), rows)
    assert [file.name for file in tmp_path.iterdir()] == ["partitions.npz"]


def test_a_client_that_has_no_partition_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "partitions.npz"
    partitions.save(path, [np.arange(3), np.arange(3, 5)])
    for client_id in (-1, 2):
        with pytest.raises(ConfigError) as caught:
            partitions.load_one(path, client_id)
        assert f"client_id: expected 0 to 1 as in {path}, found {client_id}" in str(caught.value)


def test_a_missing_or_damaged_file_of_partitions_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "partitions.npz"
    partitions.save(path, [np.arange(3)])
    for damage in (path.read_bytes()[:-50], b"", None):
        path.unlink() if damage is None else path.write_bytes(damage)
        for read in (partitions.load, lambda path: partitions.load_one(path, 0)):
            with pytest.raises(PlatformError) as caught:
                read(path)
            assert f"could not read the partitions {path}: " in str(caught.value)
            assert "Hint: submit the run again" in str(caught.value)
