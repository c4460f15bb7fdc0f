"""Text of permissively licensed packages beside CPython's library: `python -m training.packages --wheels DIR --out F`.

The wheels are downloaded before (`pip download --no-deps NAME==VERSION`); the licence of each one is written beside the
text, and a wheel whose metadata name none of `LICENCES` is refused. `--notices FILE` writes their names, versions,
licences and copyright lines alone, to be shipped with what is trained on them.
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
OTHERS = ("GPL", "MPL")  # beside one of these, they are not the whole licence
# Code of others inside a package has its own licence; tests and tables teach nothing.
SKIPPED = re.compile(
    r"(^|/)(_?vendor(ed)?|packages|_?tests?|testing|conf/locale|migrations|locale-data|_unicode\w*|.*\.data)/"
)
LARGEST = 2_200_000  # characters of one package
LEGAL = re.compile(r"[^/]+\.dist-info/(licenses/)?[^/]*(licen[sc]e|copying|notice)[^/]*", re.IGNORECASE)  # not vendored
HOLDER = re.compile(r"[\s#*>]*((copyright\s*(\(c\)|©|<?\d)|©).*)", re.IGNORECASE)


def licence(wheel: zipfile.ZipFile, name: str) -> dict[str, str]:
    """The name, version and licence that a wheel's metadata tell. Raises UserError for any licence but `LICENCES`."""
    file = next(entry for entry in wheel.namelist() if entry.endswith(".dist-info/METADATA"))
    told = email.message_from_string(wheel.read(file).decode())
    classifiers = [line.split(" :: ")[-1] for line in told.get_all("Classifier", []) if line.startswith("License")]
    text = told["License-Expression"] or (told["License"] or "").split("\n")[0][:60] or " / ".join(classifiers)
    if not any(word in text for word in LICENCES) or any(word in text for word in OTHERS):
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
    found, names = of_wheels(wheels)
    library = {"name": "CPython standard library", "version": sys.version.split()[0], "licence": "PSF-2.0"}
    return [*corpus.modules(corpus.library()), *found], [library, *names]


def of_wheels(wheels: list[Path]) -> tuple[list[corpus.Module], list[dict[str, str]]]:
    """The modules of the wheels, and who wrote them under which licence. Raises UserError for any but `LICENCES`."""
    found, names = [], []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            names.append(licence(wheel, path.name))
            found += modules(wheel)
    return found, names


def holders(wheel: zipfile.ZipFile) -> list[str]:
    """The lines of its licence files that name a holder of copyright, each once."""
    files = [name for name in sorted(wheel.namelist()) if LEGAL.fullmatch(name)]
    lines = [line for name in files for line in wheel.read(name).decode("utf-8", "replace").splitlines()]
    return list(
        dict.fromkeys(" ".join(found[1].split()).rstrip(",") for line in lines if (found := HOLDER.match(line)))
    )


def notices(wheels: list[Path]) -> str:
    """One paragraph a wheel: name, version, licence, home and copyright lines, or its authors where it names none."""
    told = []
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            about, lines = licence(wheel, path.name), holders(wheel)
        page = f"https://pypi.org/project/{about['name']}/{about['version']}/"
        lines = lines or ["no copyright line in its licence files; its authors are named at its page"]
        told.append("\n".join([f"{about['name']} {about['version']}: {about['licence']}", *lines, page]))
    return "\n\n".join(told) + "\n"


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.packages", description="Collect the text of packages.")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with downloaded wheels")
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", type=Path, help="text.jsonl.xz to write; licences.json goes beside it")
    out.add_argument("--notices", type=Path, help="file for their licences and copyright lines")
    args = parser.parse_args(argv)
    wheels = sorted(args.wheels.glob("*.whl"))
    if args.notices:
        args.notices.write_text(notices(wheels), encoding="utf-8")
        return
    found, names = collect(wheels)
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
