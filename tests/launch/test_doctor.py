"""The doctor finds each seeded fault, says what to change, and finds none on a good host."""

import dataclasses

import pytest

from launch.doctor import Answer, Finding, Place, answer_here, environment_of, faults_of, hosts_of, main, table, try_place
from vitscale.base.errors import UsageError
from vitscale.base.network import GLOO

GOOD = Answer(
    host="a",
    versions={"python": "3.11.7", "torch": "2.13.0", "deepspeed": "0.19.8", "code": "aa"},
    clock_unix_s=0.0,
    address="10.0.0.1",
    interfaces={"eth0": "10.0.0.1"},
    place=Place(fault="", free_bytes=10**12, free_files=10**6),
)


def findings(**changes: object) -> list[Finding]:
    """Two hosts; the changes are those of the second."""
    skew_s = changes.pop("skew_s", 0.0)
    other = dataclasses.replace(GOOD, host="b", **changes)  # type: ignore[arg-type]
    return [Finding(name="a", answer=GOOD), Finding(name="b", answer=other, clock_skew_s=skew_s)]  # type: ignore[arg-type]


SEEDED = {
    "version": (
        {"versions": GOOD.versions | {"torch": "2.12.0"}},
        {},
        "one version of torch on all hosts, got 2.13.0 on a, 2.12.0 on b",
    ),
    "code": ({"versions": GOOD.versions | {"code": "bb"}}, {}, "copy the same source tree to all hosts"),
    "clock": ({"skew_s": 7.0}, {}, "the clock of host b is 7 s ahead of the others"),
    "interface": ({"interfaces": {"ens1": "10.0.0.2"}}, {GLOO: "eth0"}, "host b has no network interface 'eth0'"),
    "no network": ({"interfaces": {}, "address": "127.0.1.1"}, {}, "the name of host b stands for 127.0.1.1"),
    "not shared": (
        {"place": Place(fault="does not see what another host writes in /run", free_bytes=10**12, free_files=10**6)},
        {},
        "host b does not see what another host writes in /run; expected --run on a file system that all hosts share",
    ),
    "full": ({"place": Place(fault="", free_bytes=10**6, free_files=10**6)}, {}, "host b has 1.0 MB left for the run"),
    "inodes": ({"place": Place(fault="", free_bytes=10**12, free_files=3)}, {}, "host b may make only 3 more files"),
}


@pytest.mark.parametrize("seeded", SEEDED)
def test_each_fault_is_one_sentence(seeded):
    changes, environ, words = SEEDED[seeded]
    (fault,) = faults_of(findings(**changes), environ)
    assert words in fault and "\n" not in fault


def test_good_hosts_have_no_fault_and_a_silent_one_has_its_own():
    assert faults_of(findings(), {GLOO: "eth0"}) == []
    silent = [*findings(), Finding(name="c", fault="ssh to c fails (no route); …")]
    assert faults_of(silent, {}) == ["ssh to c fails (no route); …"]
    assert table(silent).splitlines()[-1].split() == ["c", "no", "answer"]


def test_file_systems_that_do_not_count_files_are_no_fault():
    place = Place(fault="", free_bytes=10**12, free_files=-1)
    assert faults_of(findings(place=place), {}) == []


def test_this_host_is_looked_at_and_nothing_is_left(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["doctor.py", "--run", str(tmp_path / "runs" / "new")])
    main()
    said = capsys.readouterr().out
    assert "no fault on 1 host" in said and list(tmp_path.iterdir()) == []


def test_a_place_that_is_not_shared_or_not_writable_is_seen(tmp_path):
    assert try_place(tmp_path, "token").fault == f"does not see what another host writes in {tmp_path}"
    (tmp_path / ".doctor-token").touch()
    assert try_place(tmp_path, "token").fault == ""
    assert "cannot write in" in try_place(tmp_path / "none", "token").fault
    assert answer_here(None, "token").place is None


def test_hostfiles(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("# ours\na slots=8\n\nb  slots=8 # new\n")
    assert hosts_of(path) == ["a", "b"]
    for wrong in ("a\n", "", "a slots=1\na slots=1\n", "-oProxyCommand=x slots=1\n"):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="expected lines `HOST slots=N`"):
            hosts_of(path)
    with pytest.raises(UsageError, match="cannot be read"):
        hosts_of(tmp_path / "none")


def test_the_environment_file_of_the_working_directory_wins(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    for directory, text in ((home, "A=1\nB=1\n"), (here, "B=x=2\n\n")):
        directory.mkdir()
        (directory / ".deepspeed_env").write_text(text)
    assert environment_of(home, here) == {"A": "1", "B": "x=2"}
