"""What is known of our kernels on this machine: checked once, kept, taken up at every load.

A kernel that failed its self-check stays off on this machine until the chip, macOS, MLX or this package changes. Rules
for the routed experts and other products that `python -m mlx_gemma_mtp.doctor` measured come before the built-in ones.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._version import __version__
from ..files.files import CACHE, cache_folder, whole
from ..machine import device
from . import expert_paths, kernels

FORMAT = 2


def machine() -> dict[str, Any]:
    """Returns what decides whether a kernel works: chip, system, MLX's version and ours."""
    return {
        "chip": device.name() if kernels.available() else kernels.NO_GPU,
        "macos": platform.mac_ver()[0] or platform.platform(),
        "mlx": mx.__version__,
        "mlx_gemma_mtp": __version__,
    }


class Report:
    """The file of this machine. It holds each kernel's finding, None where it passed, and the rules that were
    measured, if any.
    """

    def __init__(self, folder: Path | None = None):
        self.key = machine()
        name = sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"kernels-{name}.json"

    def read(self) -> tuple[dict[str, str | None], tuple[expert_paths.Rule, ...]] | None:
        """Returns the findings and the rules; None where there is no file, or one that is not ours, so that the checks
        run again.
        """
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT or data["machine"] != self.key or set(data["checked"]) != set(kernels.KERNELS):
                return None
            return data["checked"], tuple(map(_rule, data["rules"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, checked: dict[str, str | None], rules: Sequence[expert_paths.Rule]) -> None:
        """Writes the file, whole or not at all. Raises OSError."""
        data = {
            "format": FORMAT,
            "machine": self.key,
            "checked": checked,
            "rules": [_plain(rule) for rule in rules],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as part:
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def check() -> dict[str, str | None]:
    """Runs the self-check of every kernel that may run. Returns what each found, None where it passed."""
    kernels.forget_failures()
    kernels.self_check()
    return {name: kernels.failure(name) for name in kernels.KERNELS}


def ensure(notice: Callable[[str], None], report: Report | None = None) -> None:
    """Takes up what is known of this machine's kernels, or checks them, which takes a second, once. Call it before a
    model runs on a GPU. notice: told of every kernel that is off.
    """
    if all(kernels.why_off(name) for name in kernels.KERNELS):
        return
    report = report or Report()
    known = report.read()
    if known is None:
        known = check(), ()
        try:
            report.write(*known)
        except OSError as error:
            notice(
                f"the kernels' checks cannot be kept in {report.path} ({error.strerror}), so that they run at every "
                f"start; name a folder that can be written: {CACHE}=FOLDER"
            )
    checked, rules = known
    for name, finding in checked.items():
        if finding is not None:
            kernels.switch_off(name, finding)
            notice(f"the kernel {name} is off, plain MLX runs instead: {finding}")
    expert_paths.adopt(rules)


def _plain(rule: expert_paths.Rule) -> dict[str, Any]:
    return {
        "chip": rule.chip,
        "dtype": rule.dtype,
        "weights": rule.weights,
        "side": rule.side,
        "steps": [[start, str(path)] for start, path in rule.steps],
        "equal": sorted(map(str, rule.equal)),
    }


def _rule(data: dict[str, Any]) -> expert_paths.Rule:
    """Returns the rule that `_plain` wrote. Raises KeyError, TypeError or ValueError for what is none."""
    names = {str(path): path for kind in (expert_paths.ExpertPath, expert_paths.ProductPath) for path in kind}
    steps = tuple((int(start), names[path]) for start, path in data["steps"])
    equal = frozenset(names[path] for path in data["equal"])
    case = str(data["chip"]), str(data["dtype"]), str(data["weights"])
    return expert_paths.Rule(*case, steps, equal, int(data["side"]))
