"""Imports point downwards, and each third-party library has one home.

The checkers are functions of a source tree, so that small wrong trees show that they can fail.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vitscale", "data_pipeline", "launch")

# The house, top first (design.md 3). A module belongs to the row with its longest prefix and imports from its own row
# (without rings) or from a lower one.
LAYERS = [
    ["launch"],
    ["launch.command", "launch.bench_checkpoint", "launch.bench_loader", "launch.bench_step", "launch.certificate"],
    ["launch.peers"],
    ["launch.assemble", "launch.estimates"],
    ["launch.gate", "launch.job"],
    ["launch.engines"],
    ["launch.trained", "launch.datasets", "launch.phased", "launch.branch"],
    ["launch.arguments"],
    ["vitscale.training.trainer"],
    ["vitscale.evaluation", "vitscale.insight"],
    ["vitscale.training"],
    ["vitscale.weights"],
    ["vitscale.model"],
    ["vitscale.planning"],
    ["vitscale.recipes", "vitscale.ds_config", "vitscale.ds_check", "vitscale.ds_keys"],
    ["vitscale.config", "vitscale.model.config", "vitscale.model.presets", "vitscale.model.flops"],
    ["data_pipeline"],
    ["data_pipeline.config"],
    ["vitscale.base"],
]
# What one package may see of another, beyond the order of the layers.
WINDOWS = {
    ("vitscale", "data_pipeline"): ["data_pipeline.config"],
    ("vitscale", "launch"): [],
    ("data_pipeline", "vitscale"): ["vitscale.base"],
    ("data_pipeline", "launch"): [],
}
# Library: the modules that import it. numpy and torch are the language here; where torch is not wanted is another test.
HOMES = {
    "accelerate": ["vitscale.evaluation", "launch.evaluate"],
    "braceexpand": ["data_pipeline.sources.packed"],
    "cv2": ["data_pipeline.colour", "data_pipeline.decode"],
    "deepspeed": ["vitscale.training.engine", "launch.peers"],
    "matplotlib": ["vitscale.insight"],
    "numpy": [*PACKAGES],
    "obstore": ["data_pipeline.store"],
    "PIL": ["data_pipeline.decode", "vitscale.insight"],
    "pyarrow": [
        "data_pipeline.labels",
        "data_pipeline.listing",
        "data_pipeline.manifest",
        "data_pipeline.source",
        "data_pipeline.sources",
    ],
    "safetensors": ["vitscale.weights.native", "vitscale.weights.foreign", "vitscale.weights.tensors"],
    "simplejpeg": ["data_pipeline.jpeg"],
    "sklearn": ["data_pipeline.sources.digits"],
    "tensorboard": ["vitscale.training.metrics"],
    "timm": ["launch.certificate", "launch.peers"],
    "torch": [*PACKAGES],
    "torch.utils.tensorboard": ["vitscale.training.metrics"],
    "torchvision": ["launch.peers"],
    "transformers": ["launch.certificate"],
    "tqdm": ["vitscale.base.progress"],
    "webdataset": ["data_pipeline.write", "launch.peers"],
    "xxhash": ["vitscale.base.files"],
}
# Imports inside a function, each with its reason in the code beside it.
LATE = {
    ("launch.assemble", "vitscale.insight.board"),
    ("launch.certificate", "timm"),
    ("launch.certificate", "transformers"),
    ("data_pipeline.sources.digits", "sklearn.datasets"),
    ("launch.peers", "deepspeed"),
    ("launch.peers", "timm.data"),
    ("launch.peers", "timm.models.vision_transformer"),
    ("launch.peers", "torchvision"),
    ("launch.peers", "webdataset"),
}
TORCHLESS = [
    "vitscale.base",
    "vitscale.config",
    "vitscale.recipes",
    "vitscale.ds_config",
    "vitscale.ds_check",
    "vitscale.ds_keys",
    "vitscale.planning",
    "vitscale.model.config",
    "vitscale.model.presets",
    "vitscale.model.flops",
    "vitscale.training.schedule",
    "data_pipeline.config",
    "data_pipeline.mixture",
    "data_pipeline.order",
]


@dataclass(frozen=True)
class Edge:
    """One imported thing: `name` of `module` as written, resolved to a module of the tree where it is one."""

    importer: str
    target: str
    name: str
    is_late: bool


def modules_of(root: Path) -> dict[str, ast.Module]:
    found = {}
    for path in sorted(file for package in PACKAGES for file in (root / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text())
    return found


def edges_of(name: str, tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[Edge]:
    late = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Edge(name, alias.name, "", id(node) in late)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                is_module = inner in modules or inner in HOMES
                yield Edge(name, inner if is_module else module, "" if is_module else alias.name, id(node) in late)


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer_of(module: str) -> int:
    """Height above the ground."""
    rows = [(len(p), len(LAYERS) - row) for row, prefixes in enumerate(LAYERS) for p in prefixes if is_within(module, p)]
    return max(rows)[1] if rows else -1


def wrong_edges(root: Path) -> list[str]:
    """Every import that the tables above do not allow, as sentences."""
    modules = modules_of(root)
    wrong, graph = [], {}
    for importer, tree in modules.items():
        edges = list(edges_of(importer, tree, modules))
        graph[importer] = sorted({edge.target for edge in edges if edge.target in modules})
        wrong += [
            f"{importer} -> {edge.target}{'.' + edge.name if edge.name else ''}: {why}"
            for edge in edges
            for why in complaints(edge, modules)
        ]
    return wrong + [f"{' -> '.join(ring)}: a ring" for ring in rings(graph)]


def complaints(edge: Edge, modules: dict[str, ast.Module]) -> Iterator[str]:
    package, target_package = edge.importer.split(".")[0], edge.target.split(".")[0]
    if edge.target.startswith("."):
        yield "imports are absolute"
        return
    if edge.is_late and (edge.importer, edge.target) not in LATE:
        yield "imports stand at the top of the file"
    if target_package in PACKAGES:
        window = WINDOWS.get((package, target_package))
        if edge.target not in modules:
            yield "there is no such module"
        elif layer_of(edge.importer) < 0 or layer_of(edge.target) < 0:
            yield "a module without a layer"
        elif layer_of(edge.target) > layer_of(edge.importer):
            yield "imports point downwards"
        if window is not None and not any(is_within(edge.target, seen) for seen in window):
            yield f"{package} sees of {target_package} only {', '.join(window) or 'nothing'}"
        if edge.name in HOMES:
            yield f"{edge.name} is imported from where it comes from"
    elif target_package not in sys.stdlib_module_names:
        library = max((name for name in HOMES if is_within(edge.target, name)), key=len, default=None)
        if library is None:
            yield "a library without a home"
        elif not any(is_within(edge.importer, home) for home in HOMES[library]):
            yield f"the home of {library} is {', '.join(HOMES[library])}"


def rings(graph: dict[str, list[str]]) -> list[list[str]]:
    """The first ring met from each module on the way down, if any."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for target in graph.get(module, []):
                walk(target, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


# ---- the laws -------------------------------------------------------------------------------------------------------


def test_every_import_is_allowed():
    assert wrong_edges(ROOT) == []


def test_packages_say_what_they_are_for_and_do_nothing():
    for name, tree in modules_of(ROOT).items():
        if (ROOT / name.replace(".", "/") / "__init__.py").is_file():
            assert ast.get_docstring(tree), f"{name} lacks a docstring"
            assert len(tree.body) == 1, f"{name}/__init__.py holds more than a docstring"


def test_every_exception_of_the_tables_is_still_needed():
    modules = modules_of(ROOT)
    edges = {(edge.importer, edge.target) for name, tree in modules.items() for edge in edges_of(name, tree, modules)}
    assert edges >= LATE


def test_the_ground_imports_without_torch():
    """In a fresh process: planning a run on a laptop must not wait for torch, nor need it."""
    ground = [name for name in modules_of(ROOT) if any(is_within(name, prefix) for prefix in TORCHLESS)]
    assert {"vitscale.base.errors", "vitscale.config", "vitscale.ds_config", "data_pipeline.order"} <= set(ground)
    program = (
        "import importlib, sys\n"
        f"for name in {ground!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, name\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_a_start_does_not_wait_for_libraries_that_most_runs_do_not_use():
    """Each takes half a second to two seconds of every start of every rank. DeepSpeed imports its Muon with each engine."""
    late = ("matplotlib", "sklearn", "pandas", "timm", "torchvision", "transformers", "torch._inductor", "torch._dynamo")
    program = (
        "import sys\n"
        "import launch.pretrain\n"
        "import deepspeed.runtime.zero.muon.muon_optimizer\n"
        f"loaded = [name for name in {late!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


# ---- the checkers can fail ------------------------------------------------------------------------------------------

GOOD = {
    "vitscale/base/files.py": "import os\nimport xxhash",
    "vitscale/config.py": "from data_pipeline.config import DataConfig\nfrom vitscale.base.files import x",
    "vitscale/model/vit.py": "import torch\nfrom torch import nn\nfrom vitscale.config import Config",
    "vitscale/training/engine.py": "import deepspeed\nfrom vitscale.config import Config",
    "vitscale/training/trainer.py": "from vitscale.training.engine import Engine\nfrom vitscale.training import engine",
    "vitscale/training/metrics.py": "from torch.utils.tensorboard import SummaryWriter",
    "data_pipeline/config.py": "from dataclasses import dataclass",
    "data_pipeline/order.py": "import numpy as np\nfrom vitscale.base import files",
    "launch/assemble.py": "from vitscale.training.trainer import train\nfrom data_pipeline.order import Order",
    "launch/pretrain.py": "from launch.assemble import carry_out",
}


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_good_tree_has_no_complaint(tmp_path):
    write_tree(tmp_path, GOOD)
    assert wrong_edges(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("vitscale/config.py", "import vitscale.model.vit", "vitscale.config -> vitscale.model.vit: imports point downwards"),
        ("vitscale/config.py", "from vitscale.model import vit", "vitscale.config -> vitscale.model.vit: imports point down"),
        ("vitscale/training/engine.py", "from vitscale.training.trainer import train", "imports point downwards"),
        ("launch/assemble.py", "from launch.pretrain import main", "imports point downwards"),
        ("vitscale/base/other.py", "from vitscale.config import Config", "imports point downwards"),
        (
            "vitscale/config.py",
            "from data_pipeline.order import Order",
            "vitscale sees of data_pipeline only data_pipeline.config",
        ),
        ("data_pipeline/order.py", "from vitscale.config import Config", "data_pipeline sees of vitscale only vitscale.base"),
        ("vitscale/model/vit.py", "import launch.assemble", "vitscale sees of launch only nothing"),
        (
            "vitscale/base/files.py",
            "import torch\nimport deepspeed",
            "files -> deepspeed: the home of deepspeed is vitscale.training",
        ),
        ("data_pipeline/order.py", "import xxhash", "the home of xxhash is vitscale.base.files"),
        ("vitscale/training/engine.py", "from torch.utils import tensorboard", "the home of torch.utils.tensorboard is"),
        ("vitscale/training/engine.py", "import torch.utils.tensorboard", "the home of torch.utils.tensorboard is"),
        ("vitscale/model/vit.py", "import scipy", "vitscale.model.vit -> scipy: a library without a home"),
        ("vitscale/training/metrics.py", "from vitscale.training.engine import deepspeed", "from where it comes from"),
        ("vitscale/model/vit.py", "def f():\n    from vitscale.config import Config", "at the top of the file"),
        ("vitscale/model/vit.py", "class A:\n  async def f(self):\n    import json", "vit -> json: imports stand at the top"),
        ("vitscale/model/vit.py", "from . import layers", "vitscale.model.vit -> ..layers: imports are absolute"),
        ("vitscale/model/vit.py", "from vitscale.model.absent import x", "there is no such module"),
        (
            "vitscale/model/vit.py",
            "import typing\nif typing.TYPE_CHECKING:\n  import launch.pretrain",
            "imports point downwards",
        ),
        (
            "vitscale/training/engine.py",
            "import vitscale.training.metrics\n",
            "vitscale.training.engine -> vitscale.training.metrics -> vitscale.training.engine: a ring",
        ),
    ],
)
def test_each_wrong_edge_is_reported(tmp_path, file, text, why):
    files = GOOD | {file: text}
    if "a ring" in why:
        files["vitscale/training/metrics.py"] = "import vitscale.training.engine"
    found = wrong_edges(write_tree(tmp_path, files))
    assert any(why in sentence for sentence in found), found
