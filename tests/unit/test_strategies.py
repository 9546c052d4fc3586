"""Flower's strategies, by their own names and parameters."""

import inspect
from typing import Any

import pytest
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from fedhpc.config import Federation, Named
from fedhpc.errors import ConfigError
from fedhpc.federation import strategies

COHORT = Federation(num_clients=100, clients_per_round=29, clients_per_evaluation=7)
INNER = {"name": "FedAvg"}

# What has no default in Flower, besides what is filled in.
MINIMAL: dict[str, dict[str, Any]] = {
    "QFedAvg": {"client_learning_rate": 0.1},
    "DifferentialPrivacyClientSideAdaptiveClipping": {"strategy": INNER, "noise_multiplier": 0.5},
    "DifferentialPrivacyClientSideFixedClipping": {
        "strategy": INNER,
        "noise_multiplier": 0.5,
        "clipping_norm": 1.0,
    },
    "DifferentialPrivacyServerSideAdaptiveClipping": {"strategy": INNER, "noise_multiplier": 0.5},
    "DifferentialPrivacyServerSideFixedClipping": {
        "strategy": INNER,
        "noise_multiplier": 0.5,
        "clipping_norm": 1.0,
    },
}
USABLE = sorted(name for name in strategies.known() if "FedXgb" not in name)
PLAIN = [name for name in USABLE if not name.startswith("DifferentialPrivacy")]
WRAPPERS = [name for name in USABLE if name.startswith("DifferentialPrivacy")]


def build(name: str, federation: Federation = COHORT, **params: Any) -> Strategy:
    named = Named(name=name, params=MINIMAL.get(name, {}) | params)
    return strategies.build(named, federation)


def refusal(name: str, **params: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        strategies.build(Named(name=name, params=params), COHORT)
    return caught.value


def test_the_strategies_are_those_of_flower() -> None:
    assert {"FedAvg", "FedProx", "FedAdam", "Krum", "FedMedian", "QFedAvg"} <= set(PLAIN)
    assert len(WRAPPERS) == 4
    for name, cls in strategies.known().items():
        assert getattr(flower, name) is cls
    assert "Strategy" not in strategies.known()


@pytest.mark.parametrize("name", USABLE)
def test_every_strategy_is_built_by_its_own_name(name: str) -> None:
    made = build(name)
    assert type(made) is getattr(flower, name)
    made.summary()


@pytest.mark.parametrize("name", PLAIN)
def test_the_cohort_is_filled_in(name: str) -> None:
    made: Any = build(name)
    assert made.min_train_nodes == 29
    assert made.min_evaluate_nodes == 7
    assert made.min_available_nodes == 100
    # Flower's own arithmetic gives exactly the cohort.
    assert max(int(100 * made.fraction_train), made.min_train_nodes) == 29
    assert max(int(100 * made.fraction_evaluate), made.min_evaluate_nodes) == 7


@pytest.mark.parametrize("clients", [1, 3, 7, 100, 2000])
def test_the_cohort_is_exact_for_every_number_of_clients(clients: int) -> None:
    for cohort in {1, clients // 3 or 1, clients - 1 or 1, clients}:
        federation = Federation(num_clients=clients, clients_per_round=cohort)
        made: Any = build("FedAvg", federation)
        assert max(int(clients * made.fraction_train), made.min_train_nodes) == cohort


def test_more_clients_are_asked_than_needed_and_noise_is_for_those_needed() -> None:
    federation = Federation(num_clients=100, clients_per_round=10, over_select=1.1)
    made: Any = build("DifferentialPrivacyServerSideFixedClipping", federation)
    assert made.strategy.min_train_nodes == 11  # 10 * 1.1 is a little more
    assert made.num_sampled_clients == 10
    few = Federation(num_clients=12, clients_per_round=10, over_select=1.5)
    made = build("FedAvg", few)
    assert made.min_train_nodes == 12


def test_no_client_evaluates_unless_asked() -> None:
    made: Any = build("FedAvg", Federation(num_clients=10, clients_per_round=5))
    assert made.fraction_evaluate == 0.0
    assert made.min_evaluate_nodes == 0


def test_what_the_config_gives_is_not_overwritten() -> None:
    made: Any = build("FedAvg", min_available_nodes=50, fraction_train=0.5)
    assert made.min_available_nodes == 50
    assert made.fraction_train == 0.5
    assert made.min_train_nodes == 29


def test_parameters_reach_the_strategy() -> None:
    assert build("FedProx", proximal_mu=0.25).proximal_mu == 0.25  # type: ignore[attr-defined]
    assert build("FedAdam", eta=0.5, tau=1e-9).tau == 1e-9  # type: ignore[attr-defined]


# --- wrappers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("inner", ["FedAvg", "FedProx", "FedMedian"])
def test_a_wrapper_holds_a_strategy_with_the_same_cohort(name: str, inner: str) -> None:
    params = {"proximal_mu": 0.5} if inner == "FedProx" else {}
    made: Any = build(name, strategy={"name": inner, "params": params})
    assert type(made.strategy) is getattr(flower, inner)
    assert made.num_sampled_clients == 29
    assert made.strategy.min_train_nodes == 29
    assert made.strategy.min_available_nodes == 100
    assert getattr(made.strategy, "proximal_mu", None) == params.get("proximal_mu")


def test_building_does_not_change_the_config() -> None:
    params = {
        "strategy": {"name": "FedAvg", "params": {}},
        "noise_multiplier": 0.5,
        "clipping_norm": 1.0,
    }
    named = Named(name="DifferentialPrivacyServerSideFixedClipping", params=params)
    for _ in range(2):
        strategies.build(named, COHORT)
    assert named.params["strategy"] == {"name": "FedAvg", "params": {}}
    assert set(named.params) == {"strategy", "noise_multiplier", "clipping_norm"}


def wrapped(inner: object) -> ConfigError:
    return refusal(WRAPPERS[0], strategy=inner, noise_multiplier=0.5)


def test_an_unknown_strategy_within_a_wrapper_is_named_with_its_path() -> None:
    error = wrapped({"name": "FedAvgg"})
    assert error.source == "strategy.params.strategy"
    assert "did you mean FedAvg?" in error.problems[0]


def test_a_wrong_parameter_within_a_wrapper_is_named_with_its_path() -> None:
    error = wrapped({"name": "FedProx", "params": {"mu": 1}})
    assert error.source == "strategy.params.strategy"
    assert error.problems == ["params.mu: FedProx has no such parameter"]


@pytest.mark.parametrize(
    "inner",
    [
        {"nme": "FedAvg"},
        {"name": 3},
        {"name": "FedAvg", "more": 1},
        {},
        "FedAvg",
        None,
        [1],
        {"name": "FedAvg", "params": [1]},
        {"name": "FedAvg", "params": None},
    ],
)
def test_what_is_no_strategy_within_a_wrapper_is_refused(inner: object) -> None:
    error = wrapped(inner)
    assert error.source == "strategy"
    assert "params.strategy: expected a mapping of name and params, found" in error.problems[0]


# --- what is refused ------------------------------------------------------------------------------


def test_an_unknown_strategy_is_answered_with_the_nearest_and_all() -> None:
    error = refusal("fedavg")
    assert error.problems == [
        "name: expected a strategy of flwr.serverapp.strategy, found 'fedavg'; did you mean FedAvg?"
    ]
    assert error.hint is not None
    assert all(name in error.hint for name in USABLE)


@pytest.mark.parametrize("name", USABLE)
def test_a_wrong_parameter_is_answered_with_the_valid_ones(name: str) -> None:
    error = refusal(name, **MINIMAL.get(name, {}), nonsense_zzz=1)
    assert error.source == "strategy"
    assert error.problems == [f"params.nonsense_zzz: {name} has no such parameter"]
    assert error.hint is not None
    for valid in inspect.signature(getattr(flower, name)).parameters:
        assert valid in error.hint


def test_a_missing_parameter_is_named() -> None:
    assert refusal("QFedAvg").problems == [
        "params.client_learning_rate: QFedAvg needs a value, found none"
    ]


def test_what_the_class_itself_refuses_is_passed_on() -> None:
    (problem,) = refusal("FedTrimmedAvg", beta=0.7).problems
    assert problem.startswith("params: FedTrimmedAvg refuses them: ")
    assert "beta" in problem


@pytest.mark.parametrize("name", ["FedXgbBagging", "FedXgbCyclic"])
def test_strategies_for_trees_are_refused(name: str) -> None:
    (problem,) = refusal(name).problems
    assert problem.startswith(f"name: {name} ")
    assert "XGBoost" in problem
