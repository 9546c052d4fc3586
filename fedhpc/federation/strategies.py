"""Build a strategy of ``flwr.serverapp.strategy`` by its own name and parameters."""

import inspect
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from pydantic import ValidationError

from fedhpc.config import Federation, Named
from fedhpc.errors import ConfigError
from fedhpc.learning.lookup import check_parameters, find


def known() -> dict[str, type[Strategy]]:
    """Return Flower's strategies by name."""
    return {
        name: cls
        for name in flower.__all__
        if isinstance(cls := getattr(flower, name), type)
        and issubclass(cls, Strategy)
        and not inspect.isabstract(cls)
    }


def build(named: Named, federation: Federation) -> Strategy:
    """Return a strategy with the cohort of ``federation``.

    Parameters that choose how many clients take part are filled in, unless the config gives them.
    A parameter ``strategy`` (of the differential-privacy wrappers) is a mapping with ``name`` and
    ``params`` itself.

    Raises
    ------
    ConfigError
        If there is no such strategy, or it refuses its parameters.
    """
    return _build(named.name, named.params, federation, "strategy")


def _build(name: str, params: dict[str, Any], federation: Federation, source: str) -> Strategy:
    cls = find(source, "a strategy of flwr.serverapp.strategy", name, known())
    if "FedXgb" in name:
        raise ConfigError(
            source, [f"name: {name} aggregates XGBoost trees, the built-in app trains PyTorch"]
        )
    accepted = inspect.signature(cls).parameters
    filled = {
        key: value for key, value in _participation(federation).items() if key in accepted
    } | params
    if "strategy" in accepted and "strategy" in filled:
        filled["strategy"] = _build_inner(filled["strategy"], federation, source)
    check_parameters(source, name, cls, filled)
    try:
        return cls(**filled)
    except (TypeError, ValueError) as error:
        raise ConfigError(source, [f"params: {name} refuses them: {error}"]) from error


def _build_inner(inner: object, federation: Federation, source: str) -> Strategy:
    try:
        named = Named.model_validate(inner)
    except ValidationError:
        raise ConfigError(
            source, [f"params.strategy: expected a mapping of name and params, found {inner!r}"]
        ) from None
    return _build(named.name, named.params, federation, f"{source}.params.strategy")


def _participation(federation: Federation) -> dict[str, Any]:
    clients = federation.num_clients
    training, evaluating = federation.clients_asked, federation.clients_per_evaluation
    return {
        # Flower takes the larger of fraction * clients, rounded down, and the minimum.
        "fraction_train": training / clients,
        "min_train_nodes": training,
        "fraction_evaluate": evaluating / clients,
        "min_evaluate_nodes": evaluating,
        "min_available_nodes": clients,
        "num_sampled_clients": federation.clients_per_round,  # whose replies are aggregated
    }
