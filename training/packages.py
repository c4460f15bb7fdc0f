"""Text of permissively licensed packages beside CPython's library: `python -m training.packages --wheels DIR --out F`.

The wheels are downloaded before (`pip download --no-deps NAME==VERSION`); the licence of each one is written beside the
text, and a wheel whose metadata name none of `LICENCES` is refused.
"""

from __future__ import annotations

import argparse
import email
import json
import lzma
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mlx_gemma_mtp.errors import UserError
from training import corpus, following
from training.cli import command

LICENCES = ("MIT", "BSD", "Apache", "PSF")
# Code of others inside a package has its own licence; tests and tables teach nothing.
SKIPPED = re.compile(
    r"(^|/)(_?vendor(ed)?|packages|_?tests?|testing|conf/locale|migrations|locale-data|_unicode\w*|.*\.data)/"
)
LARGEST = 2_200_000  # characters of one package


def licence(wheel: zipfile.ZipFile, name: str) -> dict[str, str]:
    """The name, version and licence that a wheel's metadata tell. Raises UserError for any licence but `LICENCES`."""
    file = next(entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
    told = email.message_from_string(wheel.read(file).decode())
    classifiers = [line.split(" :: ")[-1] for line in told.get_all("Classifier", []) if line.startswith("License")]
    text = told["License-Expression"] or (told["License"] or "").split("\n")[0][:60] or " / ".join(classifiers)
    if not any(word in text for word in LICENCES):
        raise UserError(
            f"{name} is under {text or 'no licence that it names'!r}, expected one of {LICENCES}; leave it out"
        )
    return {"name": told["Name"], "version": told["Version"], "licence": text}


def modules(wheel: zipfile.ZipFile) -> Iterator[corpus.Module]:
    """Its modules in path order, without vendored code, tests and generated files."""
    total = 0
    for path in sorted(wheel.namelist()):
        if not path.endswith(".py") or SKIPPED.search(path):
            continue
        text = wheel.read(path).decode("utf-8", "ignore").replace("\r\n", "\n").replace("\t", "    ")
        if 200 < len(text) < 200_000 and max(map(len, text.splitlines()), default=0) < 300 and total < LARGEST:
            total += len(text)
            yield corpus.Module(path, text)


def collect(wheels: list[Path]) -> tuple[list[corpus.Module], list[dict[str, str]]]:
    """The library's modules and those of the wheels, and who wrote them under which licence."""
    found = list(corpus.modules(corpus.library()))
    names = [{"name": "CPython standard library", "version": sys.version.split()[0], "licence": "PSF-2.0"}]
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            names.append(licence(wheel, path.name))
            found += modules(wheel)
    return found, names


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.packages", description="Collect the text of packages.")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with downloaded wheels")
    parser.add_argument("--out", type=Path, required=True, help="text.jsonl.xz to write; licences.json goes beside it")
    args = parser.parse_args(argv)
    found, names = collect(sorted(args.wheels.glob("*.whl")))
    found += following.builtin_docs()
    topics = [[f"topic/{pair.user.split('`')[1]}", pair.model] for pair in corpus.topics(corpus.library())]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(args.out, "wt", preset=9, encoding="utf-8") as file:
        for path, text in [*found, *topics]:
            file.write(json.dumps([path, text], ensure_ascii=False) + "\n")
    (args.out.parent / "licences.json").write_text(json.dumps(names, indent=1) + "\n")
    print(
        f"{len(found)} modules, {sum(len(text) for _, text in found):,} characters, {args.out.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    sys.exit(main())
