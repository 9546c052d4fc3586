"""What the doctor found: checks, how versions are compared, the table."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

Status = Literal["pass", "info", "warn", "fail"]
_STYLES = {"pass": "green", "info": "dim", "warn": "yellow", "fail": "bold red"}

# A run needs these to be the same everywhere: they carry pickles of jobs and messages, or decide
# numbers. Of Python itself the minor version does.
_DECISIVE = ("fedhpc", "flwr", "flwr-datasets", "numpy", "submitit", "torch", "torchvision")
PACKAGES = (*_DECISIVE, "cryptography", "grpcio", "protobuf", "pydantic", "scikit-learn")
MISSING = "not installed"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes
    ----------
    name : str
        What was checked.
    where : str
        "login (<host>)", "server (<host>)" or "client (<host>)".
    status : {"pass", "info", "warn", "fail"}
        info: told, not judged. warn: a run may work, but not as asked. fail: a run will fail.
    found : str
        With the values.
    remedy : str
        What to do; "" where there is nothing to do.
    """

    name: str
    where: str
    status: Status
    found: str
    remedy: str = ""


def read(values: object) -> list[Check]:
    """Return the checks of a report that another process wrote; garbage is left out."""
    names = {field.name for field in fields(Check)}
    found = values if isinstance(values, list) else []
    return [Check(**v) for v in found if isinstance(v, dict) and v.keys() == names]


def compare_versions(versions: Mapping[str, Mapping[str, str]]) -> Check:
    """Compare what is installed where.

    Parameters
    ----------
    versions : mapping
        By place, "login (<host>)" first: version by package; "python" and "sources" (a digest of
        fedhpc's own) are among them.

    Returns
    -------
    Check
        fail where a decisive package differs, warn where another one does.
    """
    places = list(versions)
    names = list(dict.fromkeys(name for found in versions.values() for name in found))
    different, decisive = [], False
    for name in names:
        found = [versions[place].get(name, MISSING) for place in places]
        if len(set(found)) == 1:
            continue
        shown = ", ".join(f"{version} on {p}" for version, p in zip(found, places, strict=True))
        label = "fedhpc's source files" if name == "sources" else name
        different.append(f"{label}: {shown}")
        minors = {version.rpartition(".")[0] for version in found}
        decisive |= name in _DECISIVE or MISSING in found or (name == "python" and len(minors) > 1)
    if not different:
        first = versions[places[0]]
        shown = ", ".join(f"{name} {first[name]}" for name in ("python", "fedhpc", "flwr", "torch"))
        return Check(
            "versions", "everywhere", "pass", f"the same: {shown} and {len(names) - 4} more"
        )
    return Check(
        "versions",
        "everywhere",
        "fail" if decisive else "warn",
        "\n".join(different),
        "install the same versions: the jobs' Python is cluster.python, after cluster.setup, in"
        " cluster.container",
    )


def count(checks: Iterable[Check]) -> dict[str, int]:
    """Return how many checks there are of each status."""
    counted = Counter(check.status for check in checks)
    return {status: counted[status] for status in ("fail", "warn", "info", "pass")}


def summary(checks: Sequence[Check], seconds: float) -> str:
    """Return the last line."""
    counts = count(checks)
    parts = [f"{counts['fail']} failed"] if counts["fail"] else ["nothing failed"]
    if counts["warn"]:
        parts.append(f"{counts['warn']} to look at")
    return f"{', '.join(parts)}, {counts['pass']} passed, in {seconds:.1f} s"


def to_json(checks: Sequence[Check], seconds: float, **more: Any) -> dict[str, Any]:
    """Return what ``--json`` prints."""
    listed = [asdict(check) for check in checks]
    return {**count(checks), "seconds": round(seconds, 2), **more, "checks": listed}


def print_table(console: Console, checks: Sequence[Check]) -> None:
    """Print a row a check; the remedy stands below what was found."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("result", "check", "where"):
        table.add_column(name, no_wrap=name == "result")
    table.add_column("found, and what to do", overflow="fold", ratio=1)
    for check in checks:
        found = Text(check.found)
        if check.remedy:
            found.append(f"\n-> {check.remedy}", style="bold")
        result = check.status.upper() if check.status in ("warn", "fail") else check.status
        table.add_row(
            Text(result, _STYLES[check.status]), Text(check.name), Text(check.where), found
        )
    console.print(table)
