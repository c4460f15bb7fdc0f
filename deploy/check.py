"""`python -m deploy.check`: whether the manifests are valid, and their flags those that the servers have.

The manifests are validated against Kubernetes' schemas, which the package kubernetes-validate ships. The flags are read
from the sources in the wheels of vLLM and SGLang: the classes from which their parsers are made. Nothing of them is
imported, since both need a GPU's libraries. deploy/flags.json has what was read; --record reads it again, from --wheels
or from the registry.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FLAGS = HERE / "flags.json"
MANIFESTS = sorted(HERE.glob("*.yaml"))
KUBERNETES = "1.34"
VERSIONS = {"vllm": "0.33.0", "sglang": "0.5.23"}
# Files of each wheel, and the classes there whose fields are flags; none names all classes.
SOURCES: dict[str, dict[str, set[str]]] = {
    "vllm": {
        "vllm/engine/arg_utils.py": {"EngineArgs", "AsyncEngineArgs"},
        "vllm/entrypoints/common/cli_args.py": {"BaseFrontendArgs", "FrontendArgs"},
    },
    "sglang": {"sglang/srt/arg_groups/fields/": set()},
}
CONFIG = ("vllm/config/speculative.py", "SpeculativeConfig")  # of --speculative-config
PARSERS = {  # where the names of the parsers of calls and thoughts are
    "vllm": ("vllm/tool_parsers/__init__.py", "vllm/reasoning/__init__.py"),
    "sglang": ("sglang/srt/function_call/function_call_parser.py", "sglang/srt/parser/reasoning_parser.py"),
}


def fields_of(source: str, classes: set[str]) -> set[str]:
    """Returns the fields of classes in a source; of all where none is named."""
    return {
        line.target.id
        for each in ast.walk(ast.parse(source))
        if isinstance(each, ast.ClassDef) and (not classes or each.name in classes)
        for line in each.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and not _hidden(line)
    }


def _hidden(line: ast.AnnAssign) -> bool:
    """Whether a field is none of the command line."""
    return "no_cli=True" in ast.unparse(line.annotation)


def read(name: str, wheel: Path) -> dict[str, list[str]]:
    """Returns what a wheel has: flags, fields of the speculative configuration, and names of parsers."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        flags: set[str] = set()
        for path, classes in SOURCES[name].items():
            for each in names:
                if each == path or (path.endswith("/") and each.startswith(path) and each.endswith(".py")):
                    flags |= fields_of(archive.read(each).decode(), classes)
        calls, thoughts = (
            sorted(set(re.findall(r'^\s+"([\w-]+)":', archive.read(path).decode(), flags=re.M)))
            for path in PARSERS[name]
        )
        found = {"flags": sorted(each.replace("_", "-") for each in flags), "tool-call-parser": calls}
        found["reasoning-parser"] = thoughts
        if name == "vllm":
            found["speculative-config"] = sorted(fields_of(archive.read(CONFIG[0]).decode(), {CONFIG[1]}))
    return found


def record(wheels: Path | None) -> dict[str, Any]:
    """Returns what the wheels of both have. wheels: the folder that has them; None downloads them."""
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, version in VERSIONS.items():
            where = wheels or Path(folder)
            if wheels is None:
                pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
                subprocess.run([*pip, "-d", folder, f"{name}=={version}"], check=True)
            [wheel] = where.glob(f"{name}-{version}-*.whl")
            found[name] = {"version": version} | read(name, wheel)
    return found


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the objects of a manifest."""
    import yaml

    yield from filter(None, yaml.safe_load_all(path.read_text()))


def containers(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the containers that an object starts."""
    return document.get("spec", {}).get("template", {}).get("spec", {}).get("containers", [])


def wrong_flags(container: Mapping[str, Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Yields what a container's arguments have that its server does not. known: of that server."""
    for argument in container.get("args", ()):
        if not argument.startswith("--"):
            continue
        name, _, value = argument.removeprefix("--").partition("=")
        if name.removeprefix("no-") not in known["flags"] and name not in known["flags"]:
            yield f"--{name} is no flag of {container['name']} {known['version']}"
        elif name in ("tool-call-parser", "reasoning-parser") and value not in known[name]:
            yield f"--{name}: there is no parser {value!r} in {container['name']} {known['version']}"
        elif name == "speculative-config":
            given = json.loads(value)
            for key in given.keys() - set(known[name]):
                yield f"--{name}: there is no {key!r} in {container['name']} {known['version']}"


def wrong_shapes(document: Mapping[str, Any]) -> Iterator[str]:
    """Yields what Kubernetes' schema does not allow in an object."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


def check(known: Mapping[str, Any], shapes: bool) -> Iterator[str]:
    """Yields what is wrong with the manifests. shapes: whether they are compared with the schemas."""
    for path in MANIFESTS:
        for document in documents(path):
            where = f"{path.name}: {document['kind']} {document['metadata']['name']}"
            if shapes:
                yield from (f"{where}: {each}" for each in wrong_shapes(document))
            for container in containers(document):
                yield from (f"{where}: {each}" for each in wrong_flags(container, known[container["name"]]))
                version = container["image"].rpartition(":")[2].removeprefix("v")
                if version != known[container["name"]]["version"]:
                    yield f"{where}: the image is of {version}, the flags are of {known[container['name']]['version']}"


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where something is wrong."""
    p = argparse.ArgumentParser(prog="deploy.check", description=__doc__)
    p.add_argument("--record", action="store_true", help="read the flags again, and write deploy/flags.json")
    p.add_argument("--wheels", type=Path, metavar="FOLDER", help="that has the wheels (default: they are downloaded)")
    args = p.parse_args(argv)
    if args.record or args.wheels:
        FLAGS.write_text(json.dumps(record(args.wheels), indent=1) + "\n")
    wrong = list(check(json.loads(FLAGS.read_text()), shapes=True))
    print("\n".join(wrong) or f"{len(MANIFESTS)} manifests are good")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
