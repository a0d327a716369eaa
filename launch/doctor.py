"""Look at the hosts of a run before it starts: `python launch/doctor.py --hostfile FILE --run DIR`.

Each host is asked over ssh, as deepspeed would reach it: does it run the same versions and the same code, does its clock agree,
can the others reach it, does it see the run directory and may it write there. One table, one sentence for each fault, exit 3;
or exit 0.
"""

import argparse
import json
import os
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.arguments import Parser
from vitscale.base.agreement import ROOT, Facts, clock_faults, program_versions, version_faults
from vitscale.base.errors import ExitCode, UsageError, run_main
from vitscale.base.files import canonical_json, fsync_path
from vitscale.base.network import ENVIRONMENT_FILE, GLOO, address_of, interfaces, missing_interface, unreachable
from vitscale.base.progress import bytes_in_words

SSH_TIMEOUT_S = 10
HOST_TIMEOUT_S = 60.0
FREE_MIN_BYTES = 1_000_000_000
FREE_MIN_FILES = 1_000

EPILOG = """\
--hostfile FILE   lines `HOST slots=N`, as deepspeed takes them; without it only this host is looked at
--run DIR         the directory that all hosts will write to

ssh is given what PDSH_SSH_ARGS_APPEND holds, as pdsh gives it. Interfaces are those that .deepspeed_env names.
"""


@dataclass(frozen=True, kw_only=True)
class Place:
    """The run directory as one host sees it."""

    fault: str
    """What it could not do there; empty: nothing."""
    free_bytes: int
    free_files: int
    """-1: the file system does not count them."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one host says of itself."""

    host: str
    """Its own name."""
    versions: dict[str, str]
    clock_unix_s: float
    address: str
    """Of its own name; empty: none."""
    interfaces: dict[str, str]
    place: Place | None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A host of the hostfile and what came of asking it."""

    name: str
    fault: str = ""
    """Why there is no answer."""
    answer: Answer | None = None
    clock_skew_s: float = 0.0
    """Its clock minus ours, less than the time of an ssh wrong."""


def main() -> None:
    parser = Parser(description=__doc__ or "", epilog=EPILOG)
    parser.add_argument("--hostfile", type=Path, metavar="FILE")
    parser.add_argument("--run", type=Path, metavar="DIR")
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer is not None:
        sys.stdout.write(canonical_json(asdict(answer_here(args.run, args.answer))).decode())
        return
    hosts = hosts_of(args.hostfile) if args.hostfile else []
    findings = look_at(hosts, args.run)
    print(table(findings))
    faults = faults_of(findings, environment_of(Path.home(), Path.cwd()))
    for fault in faults:
        print(f"fault: {fault}")
    if faults:
        sys.exit(ExitCode.ENVIRONMENT)
    print(f"no fault on {len(findings)} host{'s' if len(findings) > 1 else ''}")


def hosts_of(hostfile: Path) -> list[str]:
    """Names of a hostfile, in its order."""
    try:
        lines = [line.split("#")[0].split() for line in hostfile.read_text().splitlines()]
    except OSError as error:
        raise UsageError(f"--hostfile {hostfile} cannot be read ({error}); expected lines `HOST slots=N`") from None
    hosts = [words[0] for words in lines if words]
    wrong = [" ".join(words) for words in lines if words and (len(words) < 2 or not words[1].startswith("slots="))]
    if wrong or not hosts or len(set(hosts)) < len(hosts) or any(host.startswith("-") for host in hosts):
        said = f"got {wrong[0]!r}" if wrong else "each host once"
        raise UsageError(f"--hostfile {hostfile}: expected lines `HOST slots=N`, {said}")
    return hosts


def environment_of(*directories: Path) -> dict[str, str]:
    """What deepspeed gives to all hosts: the lines of its files, the last word counts."""
    found: dict[str, str] = {}
    for path in (directory / ENVIRONMENT_FILE for directory in directories):
        if path.is_file():
            found |= dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
    return found


# ---- asking ---------------------------------------------------------------------------------------------------------


def look_at(hosts: Sequence[str], run: Path | None) -> list[Finding]:
    """Ask every host at the same time; with no hosts, this one."""
    token = secrets.token_hex(8)
    place = nearest_directory(run.resolve()) if run is not None else None
    sign = place / f".doctor-{token}" if place is not None else None
    try:
        if sign is not None:
            sign.write_text(token)
    except OSError:
        pass  # this host's own answer will say so
    try:
        if not hosts:
            return [Finding(name=socket.gethostname(), answer=answer_here(place, token))]
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            return list(pool.map(lambda host: ask(host, place, token), hosts))
    finally:
        if sign is not None:
            sign.unlink(missing_ok=True)


def nearest_directory(path: Path) -> Path:
    """The directory itself, or the first one above it that is there."""
    return path if path.is_dir() or path == path.parent else nearest_directory(path.parent)


def ask(host: str, place: Path | None, token: str) -> Finding:
    """Run this script on a host over ssh. Its login shell gets every word quoted; here no shell is between."""
    words = ["env", f"PYTHONPATH={ROOT}", sys.executable, str(ROOT / "launch" / "doctor.py"), "--answer", token]
    words += ["--run", str(place)] if place is not None else []
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}"]
    options += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    try:
        ended = subprocess.run(
            ["ssh", *options, host, shlex.join(words)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HOST_TIMEOUT_S,
        )
    except FileNotFoundError:
        return Finding(name=host, fault="there is no ssh here; install openssh-client")
    except subprocess.TimeoutExpired:
        return Finding(name=host, fault=f"host {host} has not answered for {HOST_TIMEOUT_S:.0f} s; see `ssh {host} uptime`")
    answered_at_s = time.time()
    last_words = (ended.stderr.strip().splitlines() or ["no word"])[-1]
    if ended.returncode == 255:
        return Finding(
            name=host, fault=f"ssh to {host} fails ({last_words}); expected a login without password: see `ssh {host} true`"
        )
    if ended.returncode != 0:
        return Finding(
            name=host,
            fault=f"host {host} cannot run {sys.executable} {ROOT / 'launch' / 'doctor.py'} ({last_words}); expected Python "
            "and this source tree at the same paths on all hosts",
        )
    try:
        record = json.loads(ended.stdout[ended.stdout.index("{") :])  # a login shell may have words of its own
        place_record = record.pop("place")
        answer = Answer(**record, place=Place(**place_record) if place_record else None)
    except (ValueError, TypeError, KeyError) as error:
        return Finding(
            name=host, fault=f"host {host} answers otherwise than expected ({error}); see whether its code is the same"
        )
    return Finding(name=host, answer=answer, clock_skew_s=answer.clock_unix_s - answered_at_s)


# ---- answering ------------------------------------------------------------------------------------------------------


def answer_here(place: Path | None, token: str) -> Answer:
    name = socket.gethostname()
    return Answer(
        host=name,
        versions=program_versions(),
        address=address_of(name),
        interfaces=interfaces(),
        place=try_place(place, token) if place is not None else None,
        clock_unix_s=time.time(),
    )


def try_place(place: Path, token: str) -> Place:
    """Look for the sign that the asking host has left, then write, flush, rename and delete a file."""
    fault, free_bytes, free_files = "", 0, -1
    try:
        room = os.statvfs(place)
        free_bytes, free_files = room.f_bavail * room.f_frsize, room.f_favail if room.f_files else -1
        if not (place / f".doctor-{token}").is_file():
            fault = f"does not see what another host writes in {place}"
        mine = place / f".doctor-{token}-{secrets.token_hex(4)}"
        moved = mine.with_name(mine.name + "-moved")
        try:
            mine.write_text(token)
            fsync_path(mine)
            mine.rename(moved)
            fsync_path(place)
        finally:
            mine.unlink(missing_ok=True)
            moved.unlink(missing_ok=True)
    except OSError as error:
        fault = f"cannot write in {place} ({error.strerror})"
    return Place(fault=fault, free_bytes=free_bytes, free_files=free_files)


# ---- judging --------------------------------------------------------------------------------------------------------


def faults_of(findings: Sequence[Finding], environ: Mapping[str, str]) -> list[str]:
    """Every fault in a sentence with what to change. Pure."""
    faults = [finding.fault for finding in findings if finding.fault]
    answers = [(finding, finding.answer) for finding in findings if finding.answer is not None]
    facts = [Facts(host=f.name, versions=a.versions, clock_unix_s=f.clock_skew_s) for f, a in answers]
    if facts:
        faults += [*version_faults(facts), *clock_faults(facts)]
    for finding, answer in answers:
        here = list(answer.interfaces)
        if named := environ.get(GLOO):
            faults += [fault] if (fault := missing_interface(finding.name, named, here)) else []
        elif len(findings) > 1 and not here:
            faults.append(unreachable(finding.name, answer.address, here))
        if answer.place is not None:
            faults += [f"host {finding.name} {fault}" for fault in _faults_of_place(answer.place)]
    return faults


def _faults_of_place(place: Place) -> list[str]:
    if place.fault:
        return [f"{place.fault}; expected --run on a file system that all hosts share and may write to"]
    if place.free_bytes < FREE_MIN_BYTES:
        return [f"has {bytes_in_words(place.free_bytes)} left for the run; free some, or give another --run"]
    if 0 <= place.free_files < FREE_MIN_FILES:
        return [f"may make only {place.free_files} more files (inodes) for the run; delete some, or give another --run"]
    return []


def table(findings: Sequence[Finding]) -> str:
    """One row per host."""
    rows = [["host", "python", "torch", "deepspeed", "code", "clock", "interfaces", "run directory", "free", "files"]]
    for finding in findings:
        answer = finding.answer
        if answer is None:
            rows.append([finding.name, "no answer", *[""] * (len(rows[0]) - 2)])
            continue
        place = answer.place
        rows.append(
            [
                finding.name,
                *(answer.versions.get(name, "none") for name in rows[0][1:5]),
                f"{finding.clock_skew_s:+.1f} s",
                " ".join(f"{name}={address}" for name, address in answer.interfaces.items()) or "none",
                "-" if place is None else "fault" if place.fault else "good",
                "-" if place is None else bytes_in_words(place.free_bytes),
                "-" if place is None or place.free_files < 0 else f"{place.free_files:,}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


if __name__ == "__main__":
    run_main(main)
