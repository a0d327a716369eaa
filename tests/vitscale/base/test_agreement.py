"""Hosts that differ are named, with both values."""

import pytest

from vitscale.base.agreement import PACKAGES, Facts, clock_faults, code_hash, program_versions, version_faults


def facts(host: str, clock_unix_s: float = 1000.0, **versions: str) -> Facts:
    return Facts(host=host, versions={"torch": "2.13.0", "code": "aa", **versions}, clock_unix_s=clock_unix_s)


def test_equal_hosts_have_no_fault():
    assert version_faults([facts("a"), facts("b"), facts("b")]) == []


def test_what_differs_is_said_with_hosts_and_values():
    seen = [facts("a"), facts("b", torch="2.14.0"), facts("b", torch="2.14.0"), facts("c", code="bb")]
    assert version_faults(seen) == [
        "expected one version of torch on all hosts, got 2.13.0 on a, c, 2.14.0 on b; install the same version on all hosts",
        "expected one source code of vitscale (its hash) on all hosts, got aa on a, b, bb on c; "
        "copy the same source tree to all hosts",
    ]


def test_many_hosts_are_counted():
    seen = [facts("odd", torch="1"), *(facts(f"n{number}") for number in range(9))]
    assert "2.13.0 on n0, n1, n2 and 6 more" in version_faults(seen)[0]


@pytest.mark.parametrize(
    ("skew_s", "said"), [(4.0, None), (-4.0, None), (6.0, "6 s ahead of the others"), (-3600.0, "3600 s behind the others")]
)
def test_a_clock_that_is_off_is_named(skew_s, said):
    found = clock_faults([facts("a"), facts("b"), facts("odd", clock_unix_s=1000.0 + skew_s)])
    assert found == ([f"the clock of host odd is {said}; set it by NTP"] if said else [])


def test_of_two_clocks_one_is_named():
    assert len(clock_faults([facts("a"), facts("b", clock_unix_s=1006.0)])) == 1


def test_the_hash_is_of_names_and_contents_wherever_the_tree_lies(tmp_path):
    def tree(name: str, files: dict[str, str]):
        for file, text in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return code_hash(tmp_path / name)

    files = {f"{package}/a.py": "x = 1\n" for package in PACKAGES}
    first = tree("one", files)
    assert first == tree("two", files) == tree("three", files | {"launch/notes.txt": "no code"})
    assert first != tree("four", files | {"launch/a.py": "x = 2\n"})
    assert first != tree("five", files | {"launch/b.py": ""})


def test_the_versions_are_those_of_this_process():
    torch = pytest.importorskip("torch")
    assert program_versions()["torch"] == torch.__version__
