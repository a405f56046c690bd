"""Writing tensors to a safetensors file, with the errors of a disk as OSError."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `path`; equal tensors give equal bytes. Raises OSError (a full disk: ENOSPC) with its errno.

    safetensors itself raises SafetensorError for those, and the number stands only in its message. It also
    puts a file in place that its owner alone may read: here the umask decides, as for any other file.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)
