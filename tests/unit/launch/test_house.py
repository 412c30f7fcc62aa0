"""The structure of the repository: imports point one way, `import megamem` is light, containers are not packages."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGES = {
    "megamem_kernels": ROOT / "kernels" / "megamem_kernels",
    "megamem": ROOT / "megamem",
    "megamem_data": ROOT / "data_pipeline" / "megamem_data",
    "megamem_checkpoints": ROOT / "checkpoints" / "megamem_checkpoints",
    "megamem_launch": ROOT / "launch" / "megamem_launch",
}
ALLOWED = {
    "megamem_kernels": set(),
    "megamem": {"megamem_kernels"},
    "megamem_data": {"megamem", "megamem_kernels"},
    "megamem_checkpoints": {"megamem", "megamem_kernels"},
    "megamem_launch": {"megamem", "megamem_kernels", "megamem_data", "megamem_checkpoints"},
}
# Modules that alone may import a library, so that everything else stays independent of it.
ONLY_IN = {
    "deepspeed": {"megamem/parallel", "megamem/testing/preload.py"},
    "megatron.core.parallel_state": {"megamem/parallel"},
}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    forbidden = set(PACKAGES) - ALLOWED[package] - {package}
    for path in files:
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & forbidden, f"{path} imports {tops & forbidden}"


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_behind_their_module(library: str) -> None:
    for root in PACKAGES.values():
        for path in root.rglob("*.py"):
            relative = path.relative_to(ROOT).as_posix()
            used = any(name == library or name.startswith(library + ".") for name in imports(path))
            assert not used or any(relative.startswith(p) for p in ONLY_IN[library]), f"{relative} imports {library}"


def test_containers_are_not_packages() -> None:
    for name in ("kernels", "launch", "data_pipeline", "checkpoints"):
        assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize(
    "statement",
    [
        "import megamem",
        "import megamem.cli; megamem.cli.usage()",
        "from megamem_launch.config import load_config; from megamem_launch.validate import validate; "
        "validate(load_config(None, ['base=tiny']), 1)",
    ],
)
def test_light_imports(statement: str) -> None:
    heavy = ["torch", "megatron", "deepspeed", "transformers", "datasets", "mlflow", "sklearn", "triton"]
    code = f"{statement}; import sys; loaded = set({heavy}) & set(sys.modules); assert not loaded, loaded"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_nothing_needs_more_than_the_repository() -> None:
    """No file of ours names a path outside the repository that a user's machine lacks."""
    words = ["../" + "shared", "/work" + "/"]
    files = [p for root in PACKAGES.values() for p in root.rglob("*.py")]
    files += [ROOT / "README.md", ROOT / "Makefile", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml")]
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in words), path
