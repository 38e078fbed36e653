"""Parses the header of a GGUF file: its metadata, and where each tensor lies.

Parsed here and not by the package gguf, which trusts every length in the file. Here a length is compared with the
bytes that are left before anything is read or allocated.

    magic "GGUF", version, count of tensors, count of keys      u32 u32 u64 u64
    key, type, value                                            once a key
    name, number of dimensions, dimensions, type, offset        once a tensor; the fastest dimension first
    padding to `general.alignment`, then the tensors' bytes     offsets count from here
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from eagle_jax.convert.error import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # bytes, where the metadata names no other
MAX_DIMENSIONS = 4  # of the format

# Types of metadata by their number in the file.
SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "<u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
FLOAT32, BOOL, STRING, ARRAY = 6, 7, 8, 9


@dataclasses.dataclass(frozen=True)
class Entry:
    """Describes a tensor.

    shape: the fastest dimension last, as in NumPy. type: its number in the format. offset: of its bytes in the file.
    """

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclasses.dataclass(frozen=True)
class Header:
    """Holds the parsed header of a file. size: of the whole file, in bytes."""

    path: Path
    metadata: dict[str, Any]
    entries: dict[str, Entry]
    size: int


def read_header(path: Path) -> Header:
    """Reads the header of a file.

    Raises:
      CheckpointError: for a file that is no GGUF file, of another version or byte order, cut off or damaged.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: the file is empty or damaged ({error}); download it again") from error


class _Reader:
    """Reads one value after the other, up to the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.at = path, data, 0

    def damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}; the file is damaged or incomplete, download or copy it again")

    def take(self, count: int) -> bytes:
        """Reads the next bytes."""
        if count > len(self.data) - self.at:
            raise self.damaged("the header is cut off")
        self.at += count
        return self.data[self.at - count : self.at]

    def u32(self) -> int:
        return struct.unpack("<I", self.take(4))[0]

    def u64(self) -> int:
        return struct.unpack("<Q", self.take(8))[0]

    def string(self) -> str:
        text = self.take(self.u64())
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"a string of the header is not valid UTF-8, at byte {self.at - len(text)}") from error

    def header(self) -> Header:
        self.check_format()
        count, keys = self.u64(), self.u64()
        metadata: dict[str, Any] = {}
        for _ in range(keys):  # a false count ends at the end of the file
            key = self.string()
            if key in metadata:
                raise self.damaged(f"the key {key!r} is there twice")
            metadata[key] = self.value(key, self.u32())
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self.damaged(f"general.alignment is {alignment!r}, which is no power of two")
        described: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self.string()
            if name in described:
                raise self.damaged(f"tensor {name!r} is there twice")
            described[name] = self.tensor(name)
        start = -(-self.at // alignment) * alignment
        entries = {name: Entry(shape, type, start + offset) for name, (shape, type, offset) in described.items()}
        return Header(self.path, metadata, entries, len(self.data))

    def check_format(self) -> None:
        if self.data[:4] != MAGIC:
            raise CheckpointError(f"{self.path}: is no GGUF file (it does not begin with {MAGIC.decode()})")
        self.take(4)
        version = self.u32()
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: is a big-endian GGUF file, which is not read; convert it with gguf-convert-endian"
            )
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            raise CheckpointError(f"{self.path}: is a GGUF file of version {version}; versions {known} are read")

    def value(self, key: str, type: int) -> Any:
        """Reads a value of the metadata."""
        if type == STRING:
            return self.string()
        if type == ARRAY:
            type, count = self.u32(), self.u64()
            if type == STRING:
                if count > len(self.data) // 8:  # bytes of an empty string
                    raise self.damaged(f"the array {key!r} is longer than the file")
                return [self.string() for _ in range(count)]
            return self.scalars(key, type, count)
        return self.scalars(key, type, 1)[0]

    def scalars(self, key: str, type: int, count: int) -> list[Any]:
        if type not in SCALARS:
            raise CheckpointError(f"{self.path}: the key {key!r} holds values of type {type}, which is not known")
        kind = np.dtype(SCALARS[type])
        values = np.frombuffer(self.take(count * kind.itemsize), kind)
        if type == BOOL:
            return [bool(value) for value in values]
        if type == FLOAT32:  # the shortest number that rounds to it: 1e-05, not 9.999999747378752e-06
            return [float(str(value)) for value in values]
        return values.tolist()

    def tensor(self, name: str) -> tuple[tuple[int, ...], int, int]:
        """Reads a tensor's shape, its type and its offset among the values."""
        rank = self.u32()
        if rank > MAX_DIMENSIONS:
            raise self.damaged(f"tensor {name!r} has {rank} dimensions")
        shape = tuple(self.u64() for _ in range(rank))[::-1]
        return shape, self.u32(), self.u64()
