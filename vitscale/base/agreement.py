"""Do all hosts run the same program, and do their clocks agree? Without importing torch, so that it can be asked quickly.

Ranks with another version or other code do not fail at once: they give other numbers, or wait for each other for ever.
"""

import hashlib
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("vitscale", "data_pipeline", "launch")
LIBRARIES = ("torch", "deepspeed")
ROOT = Path(__file__).resolve().parents[2]
CLOCK_SKEW_MAX_S = 5.0
"""Times in logs of several hosts mean nothing past it."""
NAMED = 3
"""Hosts that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one host says of itself."""

    host: str
    versions: Mapping[str, str]
    clock_unix_s: float
    """At the same moment on all hosts, or nearly."""


def code_hash(root: Path = ROOT) -> str:
    """16 hex digits over names and contents of all our source files: equal code, equal hash, wherever it lies."""
    digest = hashlib.sha256()
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def program_versions() -> dict[str, str]:
    """What has to be equal on all hosts of a run."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}, "code": code_hash()}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"


def version_faults(facts: Sequence[Facts]) -> list[str]:
    """One sentence for each thing that is not equal everywhere, with hosts and values. Pure."""
    faults = []
    for name in facts[0].versions:
        hosts_by_value: dict[str, list[str]] = {}
        for fact in facts:
            hosts = hosts_by_value.setdefault(fact.versions[name], [])
            if fact.host not in hosts:
                hosts.append(fact.host)
        if len(hosts_by_value) > 1:
            values = ", ".join(f"{value} on {_some(hosts)}" for value, hosts in hosts_by_value.items())
            what, remedy = f"version of {name}", "install the same version on all hosts"
            if name == "code":
                what, remedy = "source code of vitscale (its hash)", "copy the same source tree to all hosts"
            faults.append(f"expected one {what} on all hosts, got {values}; {remedy}")
    return faults


def clock_faults(facts: Sequence[Facts]) -> list[str]:
    """One sentence for each host whose clock is far from the others'. Pure."""
    middle = statistics.median_low(fact.clock_unix_s for fact in facts)
    skews_s = {fact.host: fact.clock_unix_s - middle for fact in facts}
    return [
        f"the clock of host {host} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the others; set it by NTP"
        for host, skew_s in skews_s.items()
        if abs(skew_s) > CLOCK_SKEW_MAX_S
    ]


def _some(hosts: Sequence[str]) -> str:
    return ", ".join(hosts[:NAMED]) + (f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else "")
