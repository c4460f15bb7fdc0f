"""The house: imports go down, nothing goes round, and the top holds what a user types and nothing more."""

import floors
import pytest

PACKAGE = floors.ROOT / floors.PACKAGE
TOP = {
    "__init__",
    "__main__",
    "_version",
    "errors",
    "chat",
    "generate",
    "serve",
    "verify",
    "doctor",
    "calibrate",
    "trace_routing",
}


@pytest.fixture(scope="module")
def arrows():
    return floors.graph(PACKAGE)


def test_no_import_goes_up(arrows):
    assert floors.upward(arrows) == []


def test_no_import_goes_round(arrows):
    assert floors.circles(arrows) == []
    converter = floors.graph(floors.ROOT / floors.CONVERTER)
    assert floors.circles(converter) == [] and "writer" in converter["conversion"] and "source" in converter["writer"]


def test_the_package_does_not_read_the_converter(tmp_path):
    assert floors.readers(PACKAGE, floors.CONVERTER) == []
    texts = ("import convert", "def f():\n    from convert.run import x", "from .convert import x", "import converters")
    house(tmp_path, **{f"m{place}": text for place, text in enumerate(texts)})
    found = floors.readers(tmp_path / "mlx_gemma_mtp", "convert")
    assert found == [f"m{place} imports convert" for place in range(3)]


def test_the_top_holds_what_a_user_types():
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP
    folders = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert folders <= set(floors.FLOORS)


def test_every_module_is_read(arrows):
    """A graph without arrows would be without fault, too."""
    assert {"engine.engine", "speculative.loop", "cache.cache", "ops.kernels.down"} <= arrows.keys()
    assert "models.gemma4" in arrows["models.loading"] and sum(map(len, arrows.values())) > 100


def house(tmp_path, **files: str):
    package = tmp_path / "mlx_gemma_mtp"
    for name, text in {"__init__": "__version__ = 1\n", **files}.items():
        path = package.joinpath(*name.split("/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return floors.graph(package)


@pytest.mark.parametrize(
    "text",
    [
        "from ..engine.request import Request",
        "def f():\n    from ..engine import request",
        "import mlx_gemma_mtp.engine.request",
        "from mlx_gemma_mtp.engine.request import Request",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..engine.request import Request",
    ],
    ids=["relative", "inside a function", "import", "absolute", "for type checkers"],
)
def test_an_import_that_goes_up_is_named_with_both_names(tmp_path, text):
    arrows = house(tmp_path, **{"engine/request": "Request = 1\n", "cache/kv": text})
    (line,) = floors.upward(arrows)
    assert "cache.kv" in line and "engine.request" in line


def test_commands_and_the_package_itself_are_above_everything(tmp_path):
    arrows = house(tmp_path, generate="", verify="from .generate import x", **{"cli/bar": "from .. import __version__"})
    assert [line.split(" (")[0] for line in floors.upward(arrows)] == ["cli.bar", "verify"]


def test_a_circle_is_named(tmp_path):
    arrows = house(tmp_path, **{"cache/a": "from . import b", "cache/b": "from .a import x"})
    assert floors.circles(arrows) == ["cache.a -> cache.b -> cache.a"]
    assert floors.upward(arrows) == []
