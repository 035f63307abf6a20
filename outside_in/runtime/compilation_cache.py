"""Keeps compiled programs between starts, in a folder of the user's.

It is JAX's cache (https://docs.jax.dev/en/latest/persistent_compilation_cache.html). Its entries are machine code that
is run without checks: a folder into which others may write is not used.
"""

import contextlib
import itertools
import os
import re
import stat
import warnings
from pathlib import Path
from typing import Any

import jax

OPTIONS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_compilation_cache_max_size": 2**30,  # bytes; JAX drops what was not read for longest
}
CACHE_WARNING = re.compile(r"Error (?:reading|writing) persistent compilation cache entry for '(\w+)'")


def enable_compilation_cache() -> None:
    """Let JAX keep what it compiles, or warn that it cannot. The user's settings of JAX take precedence."""
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    try:
        folder = private_folder()
        drop_undated_entries(folder)
    except (OSError, RuntimeError) as error:  # there may be no home
        warnings.warn(f"the compilation cache is off: {error}", stacklevel=2)
        return
    for option, value in OPTIONS.items():
        if option.upper() not in os.environ:
            config.update(option, value)
    config.update("jax_compilation_cache_dir", str(folder))
    drop_corrupt_entries(folder)


def private_folder() -> Path:
    """Return the cache folder, created if it is missing.

    Raises OSError when this user cannot write there, or others can.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outside-in"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} belongs to another user, or others may write to it")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to")
    return folder


def drop_undated_entries(folder: Path) -> None:
    """Remove entries without a time of last use, left by kills. With one of them JAX adds nothing any more."""
    for entry in folder.glob("*-cache"):
        if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
            entry.unlink(missing_ok=True)


def drop_corrupt_entries(folder: Path) -> None:
    """Remove the entries that JAX warns of, from now on.

    JAX compiles again, but never overwrites them. Only its first warning is shown: a full disk would cause one for each
    program.
    """
    show, seen = warnings.showwarning, itertools.count()

    def show_and_drop_entry(*warning: Any, **options: Any) -> None:
        if match := CACHE_WARNING.match(str(warning[0])):
            with contextlib.suppress(OSError):
                for entry in folder.glob(f"{match[1]}-*"):
                    entry.unlink(missing_ok=True)
            if next(seen):
                return
        show(*warning, **options)

    warnings.showwarning = show_and_drop_entry
