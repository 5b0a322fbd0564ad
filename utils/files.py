"""Files: written whole or not at all, and read without trust in what they hold."""

import json
import os
import pickle
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from utils.errors import InputError


def write_atomically(
    path: str | Path, write: Callable[[Any], None], *, previous: str | Path | None = None
) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it into place.

    A reader sees the old file or the new one. If writing fails, the old file stays. With
    ``previous``, the old file is kept under that name; ``path`` exists at every instant.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            copy = _temporary(Path(previous))
            copy.unlink(missing_ok=True)
            try:
                os.link(path, copy)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, copy)
            os.replace(copy, previous)
        os.replace(temporary, path)
        with suppress(OSError):  # where folders can be synced, the rename survives a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that a killed process left in ``folder``."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def writable(place: str | Path, flag: str) -> Iterator[None]:
    """Turn an error of writing below ``place`` into one line that names it and its flag."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error}); see {flag}") from error


def read_tensors(path: Path) -> Any:
    """The content of a file of ``torch.save`` that may be damaged or hostile, on the CPU.

    Loads tensors and plain values only, and takes no more memory than the file has bytes. Raises
    InputError, without the path, if the file is missing or cannot be read in this way.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise FileNotFoundError
        with path.open("rb") as file:
            content = _unpickle(file, status.st_size)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("no such checkpoint") from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror or error})") from error
    except pickle.UnpicklingError as error:
        reason = "it is damaged, or does not only hold tensors and plain values"
        raise InputError(f"cannot be loaded safely: {reason}") from error
    except InputError:
        raise
    except Exception as error:  # torch raises almost anything for a damaged file
        raise InputError(f"damaged, or no checkpoint ({type(error).__name__})") from error
    _check_sizes(content, status.st_size)
    return content


def _unpickle(file: IO[bytes], size: int) -> Any:
    if file.read(4) == b"PK\3\4":  # a zip file; otherwise torch's old format
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError("damaged: it is compressed, and torch.save compresses nothing")
        if sum(entry.file_size for entry in entries) > size:
            raise InputError("damaged: its parts are larger than the whole file")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_sizes(content: Any, size: int) -> None:
    """Refuse tensors and containers that take more memory than the ``size`` bytes of their file.

    A few bytes can stand for a huge tensor that repeats one value, or for a list that contains
    itself. Tensors that share a storage (tied weights) count once.
    """
    entries, found, storages = [("content", content)], 0, {}
    while entries:
        name, value = entries.pop()
        found += 1
        if isinstance(value, Mapping):
            entries += [(key if isinstance(key, str) else name, v) for key, v in value.items()]
            entries += [(name, key) for key in value]
        elif isinstance(value, (list, tuple)):
            entries += [(name, v) for v in value]
        elif isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_nested or value.device.type != "cpu":
                raise InputError(f"damaged: {name!r} is sparse, nested or without values")
            storage = value.untyped_storage()
            if value.numel() * value.element_size() > storage.nbytes():
                raise InputError(f"damaged: {name!r} is larger than what the file holds of it")
            storages[storage.data_ptr()] = storage.nbytes()
        if found > size:
            raise InputError(f"damaged: {name!r} holds more values than the file has bytes")
    if sum(storages.values()) > size:
        raise InputError("damaged: its tensors are larger than the whole file")
