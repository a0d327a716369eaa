"""No data becomes code, nothing is asked of the network or a shell by the way, and no secret is written down.

The checker is a function of a source tree, so that small wrong snippets show that every rule can fail. What is allowed
all the same stands in one table, each line with its reason.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from vitscale.base.credentials import masked, masked_words

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vitscale", "data_pipeline", "launch")

UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop", "imp", "runpy"}
NETWORK = {"socket", "ssl", "urllib.request", "http", "requests", "urllib3", "httpx", "aiohttp", "ftplib", "telnetlib"}
BUILDERS = {"eval", "exec", "compile", "__import__"}
SHELLS = {
    "os.system",
    "os.popen",
    "pty.spawn",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
}
LOADS = {
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "importlib.import_module",
    "numpy.load",
    "np.load",
    "torch.jit.load",
    "torch.hub.load",
    "shutil.unpack_archive",
    "tempfile.mktemp",
}
PROCESSES = {"subprocess.run", "subprocess.call", "subprocess.check_call", "subprocess.check_output"}

ALLOWED = {
    ("vitscale.base.cluster", "imports socket"): "the name of this host, and of the first one of a SLURM job",
    ("vitscale.base.host", "imports socket"): "the name of this host",
    ("vitscale.base.network", "imports socket"): "asks what addresses there are and who listens; nothing is sent",
    ("launch.doctor", "imports socket"): "the name of this host",
    ("launch.forked", "imports socket"): "a free port for ranks on this machine",
    ("launch.forked", "loads a native library"): "prctl of the C library that is loaded already: no file is opened",
    ("launch.supervise", "loads a native library"): "prctl of the C library that is loaded already: no file is opened",
    (
        "vitscale.training.collectives",
        "torch.distributed.broadcast_object_list pickles",
    ): "between the ranks of one run: who can send "
    "to the group can also send gradients; nothing else of the run trusts the network more than the group does",
    ("vitscale.training.collectives", "torch.distributed.all_gather_object pickles"): "as above",
    ("vitscale.training.partitions", "lets files make objects"): "the types that DeepSpeed puts beside its tensors, each named",
    ("data_pipeline.processes", "imports multiprocessing"): "pickles to children of this very process, over pipes of its own",
    ("data_pipeline.stream", "loads a native library"): "prctl of the C library that is loaded already: no file is opened",
}


def modules_of(root: Path) -> dict[str, ast.Module]:
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_text()) for path in files}


def dangers(root: Path) -> list[tuple[str, str, int]]:
    """(module, what, line) of every place where data could become code, or reach where it should not."""
    return [
        (module, what, getattr(node, "lineno", 0))
        for module, tree in modules_of(root).items()
        for node in ast.walk(tree)
        for what in dangers_of(node)
    ]


def dangers_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (f"imports {alias.name}" for alias in node.names if is_odd_import(alias.name))
    elif isinstance(node, ast.ImportFrom):
        names = {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        yield from (f"imports {name}" for name in sorted(names) if is_odd_import(name))
    elif isinstance(node, ast.Constant) and node.value == "0.0.0.0":
        yield "listens on every interface"
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        yield from dangers_of_call(called, node, {word.arg: ast.unparse(word.value) for word in node.keywords})


def is_odd_import(name: str) -> bool:
    listed = UNPICKLERS | NETWORK | {"multiprocessing"}
    return name in listed or name.split(".")[0] in listed - {"multiprocessing"}


def dangers_of_call(called: str, node: ast.Call, words: dict[str | None, str]) -> Iterator[str]:
    if called in BUILDERS | SHELLS | LOADS or called.removeprefix("builtins.") in BUILDERS:
        yield f"calls {called}"
    if called.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
        yield f"calls {called}"
    if words.get("shell", "False") != "False":
        yield f"{called} through a shell"
    if words.get("allow_pickle", "False") != "False":
        yield f"{called} unpickles"
    if called == "torch.load" and words.get("weights_only") != "True":
        yield "torch.load unpickles"
    if called.endswith("safe_globals"):
        yield "lets files make objects"
    if called.endswith("._engine.load_checkpoint"):
        yield "DeepSpeed unpickles"
    if called.startswith("torch.distributed.") and "_object" in called:
        yield f"{called} pickles"
    if called.rpartition(".")[2] in ("extract", "extractall"):
        yield f"{called} writes where the archive says"
    if called in ("ctypes.CDLL", "CDLL", "ctypes.cdll.LoadLibrary"):
        yield "loads a native library"
    if called in PROCESSES and "timeout" not in words:
        yield f"{called} without a timeout"
    if called in PROCESSES | {"subprocess.Popen"} and node.args and isinstance(node.args[0], ast.Constant | ast.JoinedStr):
        yield f"{called} of a text"
    if words.get("verify") == "False" or called.endswith("_create_unverified_context"):
        yield f"{called} does not verify certificates"
    if called in ("os.chmod", "os.umask") or called.endswith(".chmod"):
        yield "changes permissions"


def test_no_data_becomes_code():
    assert [danger for danger in dangers(ROOT) if danger[:2] not in ALLOWED] == []


def test_every_exception_is_still_needed():
    assert {danger[:2] for danger in dangers(ROOT)} >= ALLOWED.keys()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import pickle", "imports pickle"),
        ("from pickle import loads", "imports pickle"),
        ("import dill", "imports dill"),
        ("from marshal import loads", "imports marshal"),
        ("import shelve", "imports shelve"),
        ("import urllib.request", "imports urllib.request"),
        ("from urllib import request", "imports urllib.request"),
        ("import http.client", "imports http.client"),
        ("import requests", "imports requests"),
        ("import socket", "imports socket"),
        ("import multiprocessing", "imports multiprocessing"),
        ("x = eval('1')", "calls eval"),
        ("exec('1')", "calls exec"),
        ("compile('1', '', 'eval')", "calls compile"),
        ("import builtins\nbuiltins.exec('1')", "calls builtins.exec"),
        ("__import__('os')", "calls __import__"),
        ("importlib.import_module(name)", "calls importlib.import_module"),
        ("os.system('ls')", "calls os.system"),
        ("os.popen('ls')", "calls os.popen"),
        ("os.execvp('ls', [])", "calls os.execvp"),
        ("subprocess.run('ls', shell=True, timeout=1)", "subprocess.run through a shell"),
        ("subprocess.Popen(words, shell=flag)", "subprocess.Popen through a shell"),
        ("subprocess.run(words)", "subprocess.run without a timeout"),
        ("subprocess.run(f'ls {x}', timeout=1)", "subprocess.run of a text"),
        ("yaml.load('1')", "calls yaml.load"),
        ("torch.load('a', weights_only=False)", "torch.load unpickles"),
        ("torch.load('a', weights_only=trusted)", "torch.load unpickles"),
        ("torch.load('a')", "torch.load unpickles"),
        ("torch.serialization.add_safe_globals([A])", "lets files make objects"),
        ("torch.jit.load('a')", "calls torch.jit.load"),
        ("self._engine.load_checkpoint('a')", "DeepSpeed unpickles"),
        ("torch.distributed.gather_object(x)", "torch.distributed.gather_object pickles"),
        ("np.load('a')", "calls np.load"),
        ("np.lib.format.read_array(file, allow_pickle=True)", "np.lib.format.read_array unpickles"),
        ("archive.extractall(place)", "archive.extractall writes where the archive says"),
        ("archive.extract(member)", "archive.extract writes where the archive says"),
        ("shutil.unpack_archive('a')", "calls shutil.unpack_archive"),
        ("tempfile.mktemp()", "calls tempfile.mktemp"),
        ("ctypes.CDLL(name)", "loads a native library"),
        ("host = '0.0.0.0'", "listens on every interface"),
        ("session.get(url, verify=False)", "session.get does not verify certificates"),
        ("path.chmod(0o777)", "changes permissions"),
        ("os.umask(0)", "changes permissions"),
    ],
)
def test_each_danger_is_reported(tmp_path, text, why):
    (tmp_path / "vitscale").mkdir()
    (tmp_path / "vitscale" / "some.py").write_text(text)
    assert why in [what for _, what, _ in dangers(tmp_path)]


def test_what_looks_alike_is_none(tmp_path):
    (tmp_path / "vitscale").mkdir()
    text = (
        "import torch\nimport json\nfrom urllib.parse import urlsplit\nmodel.eval()\nre.compile('a')\ntorch.compile(f)\n"
        "torch.load('a', weights_only=True)\nsubprocess.run(words, timeout=1)\n"
        "torch.distributed.all_reduce(x)\njson.load(file)"
    )
    (tmp_path / "vitscale" / "some.py").write_text(text)
    assert dangers(tmp_path) == []


# ---- secrets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("s3://KEY:SEC@bucket/set", "s3://***@bucket/set"),
        ("s3://KEY:SE/CR+ET@bucket/set=3,http://user:pass@host/b=1", "s3://***@bucket/set=3,http://***@host/b=1"),
        ("data.path=ftp://user:pass@host/set", "data.path=ftp://***@host/set"),
        ("https://host/set?X-Amz-Signature=abc&more=d is gone", "https://host/set?*** is gone"),
        ("AWS_SECRET_ACCESS_KEY=abcd", "AWS_SECRET_ACCESS_KEY=***"),
        ("HF_TOKEN=hf_abc", "HF_TOKEN=***"),
        ("--api-key=abc", "--api-key=***"),
        ("{'wandb_api_key': 'abc', 'steps': 3}", "{'wandb_api_key': '***', 'steps': 3}"),
        ("password: abc", "password: ***"),
        ("model.class_token=true", "model.class_token=true"),
        ("prefix_tokens=3, tokens: 65", "prefix_tokens=3, tokens: 65"),
        ("RUN@1200 at https://host/set and /data/a@b", "RUN@1200 at https://host/set and /data/a@b"),
    ],
)
def test_credentials_in_a_text_are_hidden_and_nothing_else(text, stored):
    assert masked(text) == stored


def test_the_word_behind_a_flag_is_hidden_too():
    words = ["launch/pretrain.py", "--token", "abc", "--class-token", "on", "--data", "s3://a:b@c", "--hf-token", "abc"]
    stored = ["launch/pretrain.py", "--token", "***", "--class-token", "on", "--data", "s3://***@c", "--hf-token", "***"]
    assert masked_words(words) == stored
