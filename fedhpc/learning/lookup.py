"""Names and parameters of a config, checked against what the installed libraries offer."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any, TypeVar

from fedhpc.errors import ConfigError

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean X?"`` with the nearest known word, or nothing if none is near."""
    by_lower_case = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[near[0]]}?" if near else ""


def find(source: str, kind: str, name: str, known: Mapping[str, T]) -> T:
    """Return what ``name`` stands for.

    Parameters
    ----------
    source : str
        The config section the name was found in, for the message.
    kind : str
        What is looked for, with its article: ``"an optimizer of torch.optim"``.
    name : str
        The name as the user wrote it.
    known : mapping
        Everything that can be meant.

    Raises
    ------
    ConfigError
        If nothing has this name; it names the nearest one and all of them.
    """
    if name not in known:
        raise ConfigError(
            source,
            [f"name: expected {kind}, found '{name}'{did_you_mean(name, known)}"],
            f"valid names: {', '.join(sorted(known))}",
        )
    return known[name]


def check_parameters(
    source: str,
    name: str,
    function: Callable[..., Any],
    params: Mapping[str, Any],
    reserved: Collection[str] = (),
) -> Mapping[str, inspect.Parameter]:
    """Check that a function can be called with ``params`` as keywords; return what is valid.

    Parameters
    ----------
    source : str
        The config section the parameters were found in, for the message.
    name : str
        The name the user knows the function by.
    function : callable
        A function or class; its signature says what is valid.
    params : mapping
        What the user gave, completed with what the caller fills in for the user.
    reserved : collection of str
        Parameters that only the caller may give.

    Raises
    ------
    ConfigError
        With every unknown and every missing parameter; it names the valid ones.
    """
    valid = {
        key: parameter
        for key, parameter in _signature(function).parameters.items()
        if key not in reserved
    }
    problems = [
        f"params.{key}: {name} has no such parameter{did_you_mean(key, valid)}"
        for key in params
        if key not in valid
    ]
    problems += [
        f"params.{key}: {name} needs a value, found none"
        for key, parameter in valid.items()
        if key not in params and parameter.default is parameter.empty
    ]
    if problems:
        listed = f"valid parameters of {name}: {', '.join(valid)}"
        raise ConfigError(source, problems, listed if valid else f"{name} has no parameters")
    return valid


# Once for each function: it takes as long as a step of a small model, and fits ask again.
_signature = lru_cache(inspect.signature)
