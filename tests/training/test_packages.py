"""What is said of the packages that are trained on: their licences, and who holds the copyright."""

import zipfile
from pathlib import Path

import pytest

from mlx_gemma_mtp.errors import UserError
from training import packages

ABOUT = "Metadata-Version: 2.4\nName: Rows\nVersion: 1.2\nLicense-Expression: {}\n"
LICENCE = (
    "MIT License\n\nCopyright (c) 2019, Ann Onym,\n  Copyright 2020 Bo Nym\n# © 2021 C\n\nthe above copyright notice"
)


def wheel(folder: Path, licence: str, files: dict[str, str]) -> Path:
    path = folder / "rows-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("rows-1.2.dist-info/METADATA", ABOUT.format(licence))
        for name, text in files.items():
            made.writestr(name, text)
    return path


@pytest.mark.parametrize("place", ["licenses/LICENSE.txt", "LICENCE", "licenses/COPYING", "NOTICE.md"])
def test_a_notice_names_every_holder_once_and_no_vendored_one(tmp_path, place):
    vendored = {"rows/_vendor/x.dist-info/LICENSE": "Copyright 1999 X", "rows/licence.py": "Copyright 1998 Y"}
    files = {f"rows-1.2.dist-info/{place}": LICENCE + LICENCE} | vendored
    file = tmp_path / "notices.txt"
    wheel(tmp_path, "MIT", files)
    packages.main(["--wheels", str(tmp_path), "--notices", str(file)])
    lines = ["Rows 1.2: MIT", "Copyright (c) 2019, Ann Onym", "Copyright 2020 Bo Nym", "© 2021 C"]
    assert file.read_text() == "\n".join([*lines, "https://pypi.org/project/Rows/1.2/"]) + "\n"


def test_a_form_that_nobody_filled_in_names_nobody(tmp_path):
    form = {"rows-1.2.dist-info/LICENSE": "Copyright [yyyy] [name of copyright owner]\n(c) You must retain notices\n"}
    assert "no copyright line" in packages.notices([wheel(tmp_path, "Apache-2.0", form)])


def test_a_licence_that_is_not_permissive_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is under 'GPL-3\.0', expected one of"):
        packages.notices([wheel(tmp_path, "GPL-3.0", {})])
