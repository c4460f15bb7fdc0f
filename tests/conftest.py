"""For all tests: tables of costs go to a folder of this run, not to the user's cache; kernels stay where they are."""

import os
import tempfile
from pathlib import Path

import pytest

KERNELS = 100  # about what all tests compile, or a little less


@pytest.fixture(scope="session", autouse=True)
def cost_folder():
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_GEMMA_MTP_CACHE"] = folder
        os.environ.setdefault("TMPDIR", tempfile.gettempdir())  # else each run would compile its own
        yield folder


@pytest.fixture(scope="session", autouse=True)
def kernels_in_a_hurry(cost_folder):
    """Where most kernels are still to come, MLX compiles them for a CPU in a fifth of the time."""
    from mlx_gemma_mtp.engine import warmup
    from mlx_gemma_mtp.machine import device

    if not device.traits().compiles_on_host:
        yield
        return
    with warmup.preamble_compiled(KERNELS):
        yield


class Skipped:
    """Writes what was skipped, a name a line. What waits for a Mac is left out."""

    def __init__(self, path: Path):
        self.path, self.names = path, []

    def pytest_collectreport(self, report):
        if report.skipped:
            self.names.append(report.nodeid)

    def pytest_runtest_logreport(self, report):
        if report.skipped and "metal" not in report.keywords:
            self.names.append(report.nodeid)

    def pytest_unconfigure(self):
        self.path.write_text("".join(f"{name}\n" for name in dict.fromkeys(self.names)))


def pytest_addoption(parser):
    told = "write the names of the tests that were skipped, for a run that has their packages: pytest @FILE"
    parser.addoption("--skipped-to", type=Path, metavar="FILE", help=told)


def pytest_configure(config):
    path = config.getoption("--skipped-to")
    if path and not hasattr(config, "workerinput"):  # xdist's workers tell their parent
        config.pluginmanager.register(Skipped(path.absolute()))
