"""Read configs: strict YAML, overrides, every problem at once."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from fedhpc import files
from fedhpc.config.sections import Config, JobOptions, Named, combination_problems
from fedhpc.errors import ConfigError


class _StrictLoader(yaml.SafeLoader):
    """YAML without duplicate keys, and with 1e-3 read as a number as in YAML 1.2."""


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class _StrictDumper(yaml.SafeDumper):
    """Quotes every text that the loader would read as something else."""


_StrictDumper.yaml_implicit_resolvers = _StrictLoader.yaml_implicit_resolvers


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, list | dict):
            raise yaml.constructor.ConstructorError(
                None, None, "a key must be a single word", key_node.start_mark
            )
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' appears twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def _read(path: Path) -> str:
    """Return the text of a file; that the disk fails is no error of the config."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        if not files.is_of_disk(error):
            raise
    return files.persist(lambda: path.read_text(encoding="utf-8"), f"read {path}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        value = yaml.load(_read(path), _StrictLoader)  # noqa: S506
    except OSError as error:
        raise ConfigError(str(path), [f"could not be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), ["expected UTF-8 text"]) from error
    except (yaml.YAMLError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(str(path), [f"not valid YAML: {text}"]) from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(str(path), [f"expected sections, found a {type(value).__name__}"])
    return value


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``; params of another `Named` are not mixed in."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        renamed = (
            isinstance(old, dict)
            and isinstance(value, dict)
            and set(old) | set(value) <= {"name", "params"}
            and "name" in value
            and value["name"] != old.get("name")
        )
        if isinstance(old, dict) and isinstance(value, Mapping) and not renamed:
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _parse_assignment(assignment: str) -> dict[str, Any]:
    """Turn ``section.key=value`` into nested mappings; the value is YAML."""
    path, equals, text = assignment.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(
            "command line", [f"--set: expected section.key=value, found '{assignment}'"]
        )
    try:
        value = yaml.load(text, _StrictLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError("command line", [f"--set {path}: not a YAML value: '{text}'"]) from error
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)  # noqa: S101  (keys is never empty)
    return value


_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "missing": "a value",
    "finite_number": "a finite number",
}


def _expectation(error: Mapping[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _TYPES:
        return f"expected {_TYPES[kind]}"
    if kind == "greater_than_equal":
        return f"expected {context['ge']} or more"
    if kind == "greater_than":
        return f"expected more than {context['gt']}"
    if kind == "less_than_equal":
        return f"expected {context['le']} or less"
    if kind == "less_than":
        return f"expected less than {context['lt']}"
    if kind == "literal_error":
        return f"expected {context['expected']}"
    if kind == "string_too_short":
        return "expected a name"
    return str(error["msg"]).removeprefix("Value error, ")


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """Return the valid keys of the section that ``location`` points into."""
    section: type[BaseModel] = Config
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            break
        if issubclass(field.annotation, BaseModel):
            section = field.annotation
    return list(section.model_fields)


def _location(error: Mapping[str, Any], raw: object) -> list[str | int]:
    """Return the path of keys to a problem.

    Pydantic adds the names of a union's members; what is no key of the input is left out.
    """
    location: list[str | int] = []
    value = raw
    for part in error["loc"]:
        if isinstance(value, Mapping):
            if part not in value and error["type"] != "missing":
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
        else:
            continue
        location.append(part)
    return location


def _problems(error: ValidationError, raw: object) -> list[str]:
    lines: dict[str, str] = {}
    for entry in error.errors():
        location = _location(entry, raw)
        path = ".".join(map(str, location)) or "the file"
        if entry["type"] == "extra_forbidden":
            known = _known_keys(location[:-1])
            near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)
            prefix = "".join(f"{part}." for part in location[:-1])
            more = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            lines[path] = f"{path}: unknown key; {more}"
            continue
        expected = _expectation(entry)
        if path in lines and expected not in lines[path]:
            first, found = lines[path].split(", found ", 1)
            lines[path] = f"{first} or {expected.removeprefix('expected ')}, found {found}"
        elif path not in lines:
            found = repr(entry["input"]) if not isinstance(entry["input"], dict) else "a mapping"
            lines[path] = f"{path}: {expected}, found {found}"
    return list(lines.values())


def _with_default_names(section: BaseModel, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with the default's name and params where params alone are given."""
    completed = dict(raw)
    for key, default in section:
        value = completed.get(key)
        if not isinstance(default, BaseModel) or not isinstance(value, Mapping):
            continue
        if not isinstance(default, Named):
            completed[key] = _with_default_names(default, value)
        elif "name" not in value:
            completed[key] = _merge(default.model_dump(), value)
    return completed


def parse(raw: Mapping[str, Any], source: str) -> Config:
    """Check raw values and return the config.

    Parameters
    ----------
    raw : mapping
        Sections as read from YAML.
    source : str
        Where they come from, for the message.

    Raises
    ------
    ConfigError
        With every problem at once.
    """
    raw = _with_default_names(Config(), raw)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            source, _problems(error, raw), "python -m fedhpc.submit --schema prints every key"
        ) from error
    if problems := list(combination_problems(config)):
        raise ConfigError(source, problems)
    return config


def load(path: Path, site: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """Read a config file, the site's values over it, and ``--set`` values over both.

    Parameters
    ----------
    path : Path
        The experiment's YAML file.
    site : Path, optional
        A YAML file of the same form with what only a site knows.
    assignments : sequence of str
        ``section.key=value`` each, the value in YAML.

    Raises
    ------
    ConfigError
        With every problem at once.
    """
    raw = _read_yaml(path)
    if site is not None:
        raw = _merge(raw, _read_yaml(site))
    for assignment in assignments:
        raw = _merge(raw, _parse_assignment(assignment))
    return parse(raw, str(path))


def dump(config: Config) -> str:
    """Return the resolved config as YAML, every default written out."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=_StrictDumper, sort_keys=False, width=100
    )


def schema() -> str:
    """Return the documented defaults as YAML."""
    return "\n".join(_document(Config(), indent=0)) + "\n"


def _document(section: BaseModel, indent: int) -> Iterator[str]:
    pad = "  " * indent
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        description = field.description
        if isinstance(value, BaseModel) and not isinstance(value, Named):
            if indent == 0:
                yield ""
            yield f"{pad}# {description}"
            if value.__class__ is JobOptions:
                yield f"{pad}{name}: {{}}  # the same options as above, for this job alone"
                continue
            yield f"{pad}{name}:"
            yield from _document(value, indent + 1)
            continue
        shown = value.model_dump() if isinstance(value, BaseModel) else value
        text = yaml.dump(
            shown, Dumper=_StrictDumper, default_flow_style=True, width=1000
        ).removesuffix("\n...\n")
        yield f"{pad}{name}: {text.strip()}  # {description}"
