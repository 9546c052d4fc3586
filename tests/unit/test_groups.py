"""Means of groups of clients in place of replies."""

import math
from pathlib import Path

import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from test_cohort import CLIENTS, Federation, fails, nothing

from fedhpc.config import Federation as Settings
from fedhpc.config import Named
from fedhpc.errors import ConfigError, PlatformError
from fedhpc.federation import groups, strategies
from fedhpc.files import read_lines

AVERAGING = {"FedAvg", "FedProx", "FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"}
IN_GROUPS = {"aggregation": "hierarchical"}


@pytest.mark.parametrize("name", sorted(strategies.known()))
def test_strategies_that_average_all_replies_are_taken_and_others_refused(name: str) -> None:
    if "FedXgb" in name:
        pytest.skip("not for the built-in app")
    needed = {
        "QFedAvg": {"client_learning_rate": 0.1},
        "DifferentialPrivacyServerSideFixedClipping": {"noise_multiplier": 0, "clipping_norm": 1},
        "DifferentialPrivacyClientSideFixedClipping": {"noise_multiplier": 0, "clipping_norm": 1},
        "DifferentialPrivacyServerSideAdaptiveClipping": {"noise_multiplier": 0},
        "DifferentialPrivacyClientSideAdaptiveClipping": {"noise_multiplier": 0},
    }
    params = dict(needed.get(name, {}))
    if name.startswith("Differential"):
        params["strategy"] = {"name": "FedAvg"}
    built = strategies.build(Named(name=name, params=params), Settings())
    if name in AVERAGING:
        assert groups.check(built) is built
    else:
        with pytest.raises(ConfigError, match=f"aggregation: hierarchical.*{name} needs every"):
            groups.check(built)


def test_a_strategy_of_ones_own_is_taken_unless_it_aggregates_itself() -> None:
    class Samples(flower.FedAvg):
        def configure_train(self, *args: object, **kwargs: object) -> list[object]:  # type: ignore[override]
            return []

    class Aggregates(flower.FedAvg):
        def aggregate_train(self, *args: object, **kwargs: object) -> tuple[None, None]:  # type: ignore[override]
            return None, None

    def metrics(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        return MetricRecord()

    groups.check(Samples())
    with pytest.raises(ConfigError, match="Aggregates needs every client's reply"):
        groups.check(Aggregates())
    with pytest.raises(ConfigError, match="train_metrics_aggr_fn given to FedAvg"):
        groups.check(flower.FedAvg(train_metrics_aggr_fn=metrics))


@pytest.mark.parametrize("inline_mb", [0, 32])
def test_the_mean_of_the_groups_is_the_mean_of_the_clients(tmp_path: Path, inline_mb: int) -> None:
    sets = {"cluster": {"inline_mb": inline_mb}}
    flat = Federation(tmp_path / "flat", nothing, **sets)
    values = flat.run(2)
    grouped = Federation(tmp_path / "groups", nothing, federation=IN_GROUPS, **sets)
    assert grouped.run(2) == pytest.approx(values)
    size = math.ceil(math.sqrt(CLIENTS))
    means = [
        (fit["round"], fit["client"])
        for fit in read_lines(grouped.paths.fits)
        if fit["verb"] == groups.MESSAGE_TYPE
    ]
    first = range(0, CLIENTS, size)
    assert sorted(means) == [(r, c) for r in (1, 2) for c in first]
    assert grouped.lines[-1]["train"] == pytest.approx(flat.lines[-1]["train"])
    assert not list(grouped.paths.blobs.iterdir())


def test_whose_reply_does_not_count_is_in_no_group(tmp_path: Path) -> None:
    behaviour = fails(1, 4)
    sets = {"retry": 0, "cluster": {"inline_mb": 0}}
    values = Federation(tmp_path / "flat", behaviour, **sets).run()
    grouped = Federation(tmp_path / "groups", behaviour, federation=IN_GROUPS, **sets)
    assert grouped.run() == pytest.approx(values)
    assert grouped.lines[0]["failures"] == 2


def test_clients_without_examples_change_nothing_even_if_they_are_a_group(tmp_path: Path) -> None:
    models = []
    for aggregation in ("flat", "hierarchical"):
        sets = {"clients_per_round": CLIENTS, "aggregation": aggregation}
        federation = Federation(tmp_path / aggregation, nothing, federation=sets)
        federation.examples = {0: 0, 1: 0, 2: 0}  # groups have three
        models.append(federation.run())
    assert models[1] == pytest.approx(models[0])


def test_replies_that_were_kept_and_not_needed_leave_no_file(tmp_path: Path) -> None:
    sets = {"retry": 0, "min_completed": 1, "on_too_few": "skip_round"}
    federation = Federation(
        tmp_path, fails(1, rounds=[1]), federation=IN_GROUPS, cluster={"inline_mb": 0}, **sets
    )
    federation.run(2)
    assert "too_few" in federation.lines[0]
    assert not list(federation.paths.blobs.iterdir())


def test_a_mean_that_nobody_can_make_ends_the_run_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room for a mean")

    monkeypatch.setattr(groups, "answer", fail)
    federation = Federation(tmp_path, nothing, federation=IN_GROUPS)
    with pytest.raises(PlatformError, match=r"2 of 2 groups.*no room for a mean"):
        federation.run()
