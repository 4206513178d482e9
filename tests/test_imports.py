"""The arrows of the house: who may import whom, lazy imports included; doors, circles, private names, light imports."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kshot", "data", "vlm", "baselines", "experiments")
MAY_IMPORT = {
    "kshot": (),
    "data": ("kshot",),
    "vlm": ("kshot",),
    "baselines": ("kshot",),
    "experiments": ("kshot", "data", "vlm", "baselines"),
}
FACE = {"kshot/__init__.py", "kshot/__main__.py"}  # what users import and run: the one arrow that runs up
STOREYS = {"cli": 3, "bench": 2, "plan": 2, "report": 2, "adapters": 2, "pretrain": 2, "sweep": 1, "terminal": 0}
DOORS = ("vlm.service", "vlm.scoring", "vlm.embedding")  # the only ones outside of vlm.local that know it
SERVER_SEES = {"vlm.local.registry", "vlm.local.clients"}
TORCH = {"torch", "torchvision", "transformers", "peft", "timm", "tinker"}  # and model libraries: data imports none
HEAVY = {*TORCH, "sklearn", "scipy", "matplotlib", "pandas"}
MODULES = 16  # in a folder, at most


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {named(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(path: Path, *, running: bool = False) -> Iterator[str]:
    """Every module named by an import statement or as a string given to import_module, anywhere in the file; with
    `running` statements alone, without those for type checkers."""
    checking = [
        node for node in ast.walk(tree(path)) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    ]
    unseen = {id(node) for each in checking for node in ast.walk(each)} if running else set[int]()
    for node in ast.walk(tree(path)):
        if id(node) in unseen:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (each if each in FILES else node.module or "" for each in whole)
        elif not running and isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.split(":")[0]
            if module.count(".") >= 1 and all(part.isidentifier() for part in module.split(".")):
                yield module


def top(module: str) -> str:
    return module.split(".")[0]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_only_the_arrows_of_the_house(package: str) -> None:
    mine = {name: path for name, path in FILES.items() if within(name, package)}
    assert mine
    for path in mine.values():
        tops = {top(name) for name in imported(path)}
        assert package != "data" or not tops & TORCH, path
        if path.relative_to(ROOT).as_posix() not in FACE:
            assert tops & set(PACKAGES) <= {package, *MAY_IMPORT[package]}, path


def test_inside_experiments_the_arrows_run_down() -> None:
    for name, path in FILES.items():
        if within(name, "experiments") and name != "experiments":
            storey = name.split(".")[1]
            others = {other.split(".")[1] for other in imported(path) if within(other, "experiments") and "." in other}
            higher = {other for other in others - {storey} if STOREYS[other] >= STOREYS[storey]}
            assert not higher, f"{path} imports {higher}"


def test_the_local_engine_is_reached_through_its_doors() -> None:
    for name, path in FILES.items():
        local = {each for each in imported(path) if within(each, "vlm.local")}
        if within(name, "vlm.server"):
            assert local <= SERVER_SEES, path
        elif not within(name, "vlm.local") and name not in DOORS:
            assert not local, path
        if within(name, "vlm.local"):
            higher = {"vlm.classifier", "vlm.prompts", "vlm.scoring", "vlm.calibration", "vlm.embedding"}
            assert not higher & set(imported(path)), path
        if not within(name, "vlm.server") and within(name, "vlm"):
            assert not any(within(each, "vlm.server") for each in imported(path)), path


def test_no_module_imports_itself_through_others() -> None:
    below = {name: {each for each in imported(path, running=True) if each in FILES} for name, path in FILES.items()}
    done, under_way = set[str](), list[str]()

    def visit(name: str) -> None:
        assert name not in under_way, " → ".join([*under_way[under_way.index(name) :], name])
        if name not in done:
            under_way.append(name)
            for other in sorted(below[name] - {name}):
                visit(other)
            done.add(under_way.pop())

    for name in FILES:
        visit(name)


def test_private_names_stay_in_their_file() -> None:
    for name, path in FILES.items():
        modules = set[str]()  # what this file calls modules of ours
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and top(node.module or "") in PACKAGES:
                taken = [alias.name for alias in node.names]
                assert not [each for each in taken if each.startswith("_") and not each.endswith("__")], path
                modules |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in FILES}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                assert not node.attr.startswith("_"), f"{name} uses {node.value.id}.{node.attr}"


def test_no_module_at_the_root_and_few_in_a_folder() -> None:
    assert list(ROOT.glob("*.py")) == []
    counts = Counter(path.parent for path in FILES.values() if path.name != "__init__.py")
    assert max(counts.values()) <= MODULES, counts.most_common(1)


def test_what_the_command_line_starts_with_is_light() -> None:
    """The catalog alone is lighter still."""
    modules = "kshot, experiments.cli.main, experiments.sweep.config, experiments.sweep.store, vlm, baselines.nano"
    code = "import sys, data.catalog; print(*{'numpy', 'PIL', 'pyarrow'} & set(sys.modules));"
    code += f"import {modules}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
