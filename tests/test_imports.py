"""The arrows of the house: who may import whom, lazy imports included."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"kshot_errors", "kshot_files", "kshot_images", "kshot_machine", "kshot_training"}
MAY_IMPORT = {
    "data": LEAVES,
    "vlm": LEAVES,
    "baselines": LEAVES,
    "experiments": {*LEAVES, "data", "vlm", "baselines"},
    **dict.fromkeys(sorted(LEAVES), LEAVES),
}
HEAVY = {"torch", "torchvision", "transformers", "peft", "timm", "tinker", "sklearn", "scipy", "matplotlib", "pandas"}


def modules(package: str) -> list[Path]:
    single = ROOT / f"{package}.py"
    return [single] if single.exists() else sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Every module named by an import statement or as a string given to import_module, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrows"
            yield node.module or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            module = node.value.split(":")[0]
            if module.count(".") >= 1 and all(part.isidentifier() for part in module.split(".")):
                yield module


def top(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_the_arrows_of_the_house(package: str) -> None:
    assert modules(package)
    for path in modules(package):
        ours = {top(name) for name in imported(path)} & set(MAY_IMPORT)
        assert ours <= {package, *MAY_IMPORT[package]}, path


def test_data_imports_no_torch_and_no_model_library() -> None:
    banned = {"torch", "torchvision", "transformers", "peft", "timm", "tinker"}
    for path in modules("data"):
        assert not {top(name) for name in imported(path)} & banned, path


def test_inside_vlm_the_prompts_know_no_service_and_the_engine_no_client() -> None:
    seen = {path.relative_to(ROOT).as_posix(): set(imported(path)) for path in modules("vlm")}
    for low in ("vlm/inputs.py", "vlm/prompts.py", "vlm/labels.py", "vlm/service.py"):
        reached = {name for name in seen[low] if name.startswith(("vlm.local", "vlm.server"))}
        assert reached <= {"vlm.local.client", "vlm.local.host"}, low
    for path, names in seen.items():
        if path.startswith("vlm/local/") and path != "vlm/local/client.py":
            assert not names & {"vlm.local.client", "vlm.service", "vlm.classifier", "vlm.prompts", "vlm.scoring"}, path
        if not path.startswith("vlm/server/"):
            assert not any(name.startswith("vlm.server") for name in names), path


@pytest.mark.parametrize(
    "module", ["experiments.cli", "experiments.config", "experiments.store", "data.catalog", "vlm"]
)
def test_what_the_command_line_starts_with_is_light(module: str) -> None:
    import subprocess
    import sys

    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []
