"""Writing files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: str | Path, write: Callable[[Any], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path`` (opened in binary mode), then move it
    into place.

    A reader sees the old file or the new one; where writing fails, the old one stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")
