"""JSON that is kept between starts, in a file of its own for each key: written whole, read with distrust."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from .files import cache_folder, whole


class KeptFile:
    """A file of the cache folder. Its name tells a kind of thing, and by a hash what the thing depends on."""

    def __init__(self, name: str, format: int, key: Mapping[str, Any], folder: Path | None = None):
        """name: of the kind of thing. format: a number that changes with what is written. key: what the thing depends
        on; a file with another key is not read. folder: None is the cache folder.
        """
        self.format, self.key = format, dict(key)
        digest = sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"{name}-{digest}.json"

    def load(self) -> dict[str, Any] | None:
        """Returns what was written, or None where there is no file. Raises ValueError for a file that is not of this
        format and key.
        """
        return load(self.path, self.format, self.key)

    def save(self, data: Mapping[str, Any]) -> None:
        """Writes the data, whole or not at all. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole(self.path) as part:
            part.write_text(dumped(data, self.format, self.key), encoding="utf-8")


def dumped(data: Mapping[str, Any], format: int, key: Mapping[str, Any]) -> str:
    """Returns the text of a file of this data."""
    return json.dumps({"format": format, "key": dict(key), **data}, indent=1) + "\n"


def load(path: Path, format: int, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the data of a file, None where there is none. Raises ValueError for anything else of its name."""
    data = _json(path)
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError("it is nothing that was kept here")
    if data.get("format") != format or data.get("key") != dict(key):
        raise ValueError("it is another pair's, another machine's or another version's")
    return data


def _json(path: Path) -> Any:
    try:
        if not path.is_file():
            if not os.path.lexists(path):
                return None
            raise ValueError("it is no regular file")  # a pipe would never end
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RecursionError:
        raise ValueError("it cannot be read (nested too deeply)") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"it cannot be read ({error})") from None
