"""Memory that lies on the disk: the system holds what is being used, and the rest costs no memory."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from minga.errors import UserError

_SAMPLE = 32 << 20  # bytes that are read to see how fast a disk is


class DiskMemory:
    """Hands out tensors from one file in the cache folder that has no name any more: whatever ends the process, nothing
    stays behind. The system keeps in memory what was used last, as far as there is room. Raises `UserError` if the disk is
    too full.
    """

    def __init__(self, num_bytes: int, read_speed: float):
        """read_speed: bytes a second that the disk gives."""
        self.read_speed = read_speed
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minga"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, num_bytes)
                else:
                    file.truncate(num_bytes)
                mapped = mmap.mmap(file.fileno(), num_bytes)
        except OSError as error:
            raise UserError(
                f"{num_bytes / 1e9:.1f} GB of disk are needed to run a model that memory does not hold, and {folder} has no "
                f"room for them ({error.strerror}). free some, or set XDG_CACHE_HOME to another disk"
            ) from None
        self._bytes, self._used = torch.frombuffer(mapped, dtype=torch.uint8), 0

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty; there must be room."""
        size, start = math.prod(shape) * dtype.itemsize, self._used
        assert start + size <= len(self._bytes)
        self._used += -(-size // 64) * 64
        return self._bytes[start : start + size].view(dtype).view(shape)


def read_speed(path: Path) -> float:
    """Bytes a second that a file's disk gives, by reading some of it that the system does not hold, if it obliges."""
    with open(path, "rb", buffering=0) as file:
        size = min(_SAMPLE, os.fstat(file.fileno()).st_size)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, size, os.POSIX_FADV_DONTNEED)
        began, left = perf_counter(), size
        while left and (read := len(file.read(min(left, 1 << 20)))):
            left -= read
    return size / max(perf_counter() - began, 1e-9)
