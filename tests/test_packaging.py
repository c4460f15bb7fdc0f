"""What is shipped, and which way imports point."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TORCH = {"torch", "torchvision", "torchaudio"}


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names imported anywhere in a file, relative ones resolved."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_import_reader_sees_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "mlx_gemma_mtp" / "ops" / "kernels" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text("import a.b\ndef f():\n    from ... import convert\n    from .y import z\n")
    found = set(imports(path))
    assert {"a.b", "mlx_gemma_mtp.convert", "mlx_gemma_mtp.ops.kernels.y.z"} <= found


@pytest.mark.parametrize("path", sources("mlx_gemma_mtp"), ids=lambda p: p.stem)
def test_the_package_imports_neither_convert_nor_torch(path):
    forbidden = TORCH | {"convert", "mlx_gemma_mtp.convert"}
    assert [name for name in imports(path) if within(name, forbidden)] == []


@pytest.mark.parametrize("path", sources("convert"), ids=lambda p: p.stem)
def test_convert_needs_no_torch_and_only_the_facts_of_the_package(path):
    """What a config means, what memory it takes, where models are, what commands share; never the running of one.

    layerwise.py runs layers, one at a time: `quality` compares what two models say.
    """
    models = ("models.config", "models.raw_config", "models.quantization", "models.contents", "models.extras")
    names = ("errors", *models, "cache.spec", "files", "machine", "cli", "_version")
    running = ("models.gemma4", "models.drafter", "models.linear", "models.loading")
    names += running if path.stem == "layerwise" else ()
    facts = {f"mlx_gemma_mtp.{name}" for name in names}
    for name in imports(path):
        assert not within(name, TORCH | {"mlx_gemma_mtp.convert"}), name
        assert not within(name, {"mlx_gemma_mtp"}) or name == "mlx_gemma_mtp" or within(name, facts), name


def test_every_folder_with_code_is_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in sources("mlx_gemma_mtp")}
    assert listed == {".".join(folder.parts) for folder in folders} | {"mlx_gemma_mtp.convert"}


def test_no_dependency_is_torch():
    project = PROJECT["project"]
    installed = project["dependencies"] + project["optional-dependencies"]["test"]
    assert [line for line in installed if line.startswith("torch")] == []


def tree() -> list[str]:
    """Files that a wheel must hold: all code, the typing marker, the bundled pair and the server's page."""
    code = [str(path.relative_to(ROOT)) for path in sources("mlx_gemma_mtp")]
    converter = [f"mlx_gemma_mtp/{path.relative_to(ROOT)}" for path in sources("convert")]
    converter.append("mlx_gemma_mtp/convert/quality.txt")
    demo = ROOT / "mlx_gemma_mtp" / "demo"
    data = [str(path.relative_to(ROOT)) for path in demo.rglob("*") if path.is_file()]
    headers = [str(path.relative_to(ROOT)) for path in (ROOT / "mlx_gemma_mtp").rglob("*.h")]
    return [*code, *converter, *data, *headers, "mlx_gemma_mtp/py.typed", "mlx_gemma_mtp/server/page.html"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built once, without network, from a copy, so that no build/ folder lands in the checkout."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(
        ".*", "venv", "__pycache__", "*.egg-info", "build", "dist", "tests", "benchmarks", "shared"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_the_tree_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == set(tree())


def test_wheel_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    version = ast.parse((ROOT / "mlx_gemma_mtp" / "_version.py").read_text()).body[-1].value.value
    assert f"\nVersion: {version}\n" in metadata
    assert "mlx-gemma-mtp-convert = mlx_gemma_mtp.convert.cli:main" in scripts
    assert "mlx-gemma-mtp-generate = mlx_gemma_mtp.generate:main" in scripts
    assert "mlx-gemma-mtp-chat = mlx_gemma_mtp.chat:main" in scripts
    assert any(n.endswith("licenses/LICENSE") for n in names)
    for notice in ("PSF-LICENSE.txt", "THIRD-PARTY.txt"):
        assert any(n.endswith(notice) and "licenses/" in n for n in names)


def test_converter_runs_from_the_unpacked_wheel(wheel, tmp_path):
    """`mlx_gemma_mtp.convert` resolves as shipped, from a folder that is not the checkout."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    command = [sys.executable, "-m", "mlx_gemma_mtp.convert", "--help"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "--hf-path SOURCE" in done.stdout, done.stderr
