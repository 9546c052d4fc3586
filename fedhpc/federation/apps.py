"""Load the Flower app that a config names: the built-in one or any other, unmodified."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedhpc.config import Config
from fedhpc.errors import ConfigError
from fedhpc.federation import compat
from fedhpc.isolation.child import resolve
from fedhpc.learning.lookup import did_you_mean
from fedhpc.paths import RunPaths

_BUILTIN_SERVER = "fedhpc.federation.server_app:app"
_BUILTIN_CLIENT = "fedhpc.federation.client_app:app"

ClientCallable = Callable[[Message, Context], Message]


@dataclass(frozen=True)
class AppSpec:
    """An app, located but not loaded.

    Attributes
    ----------
    server, client : str
        "module:attribute" of its two parts.
    folder : Path or None
        Where its modules lie, if they are not installed.
    mods : list of str
        "module:attribute" of the mods around the client part.
    run_config : dict
        Its run config.
    """

    server: str
    client: str
    folder: Path | None
    mods: list[str]
    run_config: dict[str, Any]


def locate(config: Config, paths: RunPaths) -> AppSpec:
    """Find the app of a config.

    Raises
    ------
    ConfigError
        If its folder holds no valid Flower app, or a run config key is unknown to it.
    """
    app = config.app
    if app.is_builtin:
        run_config = {"run-dir": str(paths.root)}
        return AppSpec(_BUILTIN_SERVER, _BUILTIN_CLIENT, None, app.mods, run_config)
    if app.dir is None:
        assert app.server is not None  # noqa: S101  (the config checked both)
        assert app.client is not None  # noqa: S101
        return AppSpec(app.server, app.client, None, app.mods, dict(app.run_config))
    folder = Path(app.dir).expanduser().resolve()
    try:
        components, defaults = compat.read_app_folder(folder)
    except (FileNotFoundError, ValueError) as error:
        raise ConfigError(
            "app",
            [f"dir: expected the folder of a Flower app, found {folder}: {error}"],
            "it holds a pyproject.toml with [tool.flwr.app.components]",
        ) from error
    unknown = [
        f"{key}: the app has no such run config key{did_you_mean(key, defaults)}"
        for key in app.run_config
        if key not in defaults
    ]
    if unknown:
        raise ConfigError("app.run_config", unknown, f"its keys: {', '.join(defaults) or 'none'}")
    return AppSpec(
        app.server or components["serverapp"],
        app.client or components["clientapp"],
        folder,
        app.mods,
        {**defaults, **app.run_config},
    )


def load_client(spec: AppSpec) -> ClientCallable:
    """Import the ClientApp, with its mods around it.

    Raises
    ------
    ConfigError
        If the reference leads to no ClientApp.
    """
    app: ClientApp = _load(spec, "client", spec.client, ClientApp, "a ClientApp")
    mods = [_load(spec, "mods", reference, Callable, "a function") for reference in spec.mods]
    return compat.apply_mods(app, mods) if mods else app


def load_server(spec: AppSpec) -> ServerApp:
    """Import the ServerApp.

    Raises
    ------
    ConfigError
        If the reference leads to no ServerApp.
    """
    app: ServerApp = _load(spec, "server", spec.server, ServerApp, "a ServerApp")
    return app


def client_context(
    spec: AppSpec, run_id: str, client_id: int, num_clients: int, state: RecordDict
) -> Context:
    """Return the context in which a client's ClientApp is called."""
    return Context(
        run_id=compat.flower_run_id(run_id),
        node_id=client_id + 1,
        node_config={"partition-id": client_id, "num-partitions": num_clients},
        state=state,
        run_config=dict(spec.run_config),
    )


def server_context(spec: AppSpec, run_id: str) -> Context:
    """Return the context in which the ServerApp is called."""
    return Context(
        run_id=compat.flower_run_id(run_id),
        node_id=0,
        node_config={},
        state=RecordDict(),
        run_config=dict(spec.run_config),
    )


def _load(spec: AppSpec, key: str, reference: str, kind: Any, what: str) -> Any:
    """Import what a reference names and check that it is of a kind."""
    if spec.folder is not None and str(spec.folder) not in sys.path:
        sys.path.insert(0, str(spec.folder))
    try:
        found = resolve(reference)
    except (ImportError, AttributeError) as error:
        where = spec.folder or "the Python path"
        raise ConfigError(
            "app", [f"{key}: could not load {reference} from {where}: {error}"]
        ) from error
    if not isinstance(found, kind):
        raise ConfigError(
            "app", [f"{key}: expected {what} in {reference}, found {type(found).__name__}"]
        )
    return found
