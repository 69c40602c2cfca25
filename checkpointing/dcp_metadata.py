"""Reading torch.distributed.checkpoint's `.metadata`, a pickle, without letting it run anything.

A pickle names the classes and functions that it wants called. Here it gets a fixed list of plain records and nothing
else, so that a forged one can at worst describe tensors that are not there.
"""

from __future__ import annotations

import collections
import pathlib
import pickle
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_RECORDS: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__name__): kind
    for kind in (
        metadata.Metadata,
        metadata.TensorStorageMetadata,
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        collections.OrderedDict,
        torch.Size,
    )
}
# Where the checkpoint was first written is in it too: as a mere word, which nothing here looks at.
_PATHS = frozenset({"pathlib", "pathlib._local"})
_LAYOUT = ("torch.serialization", "_get_layout")
MAX_METADATA_BYTES = 2**30


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        if (module, name) == _LAYOUT:
            return _layout
        if module in _PATHS and name in ("PosixPath", "WindowsPath"):
            return pathlib.PurePosixPath
        value = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"tensor layout {name!r}")
    return torch.strided


class SafeReader(dcp.FileSystemReader):
    """torch's own reader, but for the unpickling, and only of plain files inside its folder.

    For tensors only: for other values torch's load planner unpickles what it finds.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.metadata = read_metadata(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What was read and checked once."""
        return self.metadata


def read_metadata(folder: Path) -> Metadata:
    """The checkpoint's description.

    Raises:
        ValueError: there is none, or it is damaged, of an unknown kind, or asks for code to be run.
    """
    path = folder / ".metadata"
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_METADATA_BYTES:
            raise ValueError(f"{path} is {size_bytes} bytes long, no checkpoint's is")
        with path.open("rb") as file:
            found = _unpickle(file, path)
    except OSError as error:
        raise ValueError(f"{folder} is no torch.distributed.checkpoint folder: {path}: {error.strerror}") from error
    _check(found, folder)
    return found


def _unpickle(file: IO[bytes], path: Path) -> Metadata:
    try:
        found = _Restricted(file).load()
    except (
        pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, KeyError, MemoryError,
        OverflowError, RecursionError, TypeError, ValueError, RuntimeError,
    ) as error:  # fmt: skip
        # What an unpickler raises over garbage is not bounded by its documentation.
        raise ValueError(f"{path} is refused: {error or type(error).__name__}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} is refused: it holds a {type(found).__name__}, not a checkpoint's metadata")
    return found


def _check(found: Metadata, folder: Path) -> None:
    """Every attribute that a reader goes by has the type that it should have; file names stay inside the folder."""
    entries, places = getattr(found, "state_dict_metadata", None), getattr(found, "storage_data", None)
    if not isinstance(entries, dict) or not isinstance(places, dict):
        raise ValueError(f"{folder}/.metadata is refused: it lists no tensors, or not where they are")
    for name, entry in entries.items():
        if not isinstance(name, str) or not (_is_tensor(entry) or isinstance(entry, metadata.BytesStorageMetadata)):
            raise ValueError(f"{folder}/.metadata is refused: it has no sense of {name!r}")
    for index, place in places.items():
        fine = isinstance(index, metadata.MetadataIndex) and isinstance(place, filesystem._StorageInfo)
        file = getattr(place, "relative_path", None)
        if not fine or not isinstance(file, str) or Path(file).name != file or file.startswith("."):
            raise ValueError(f"{folder}/.metadata is refused: it looks for a tensor in {file!r}")
        if not _are_counts((getattr(place, "offset", None), getattr(place, "length", None))):
            raise ValueError(f"{folder}/.metadata is refused: it looks for a tensor outside of {file}")


def _is_tensor(entry: object) -> bool:
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(getattr(entry, "properties", None), metadata.TensorProperties)
        and isinstance(getattr(entry.properties, "dtype", None), torch.dtype)
        and _are_counts(getattr(entry, "size", None))
        and isinstance(getattr(entry, "chunks", None), list)
        and all(
            isinstance(chunk, metadata.ChunkStorageMetadata)
            and _are_counts(getattr(chunk, "offsets", None))
            and _are_counts(getattr(chunk, "sizes", None))
            for chunk in entry.chunks
        )
    )


def _are_counts(values: object) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and value >= 0 for value in values)
