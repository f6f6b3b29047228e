"""Which files a recipe's glob patterns mean, always in the same order.

`{stdlib}` stands for the folder of Python's standard library and `~` for the home folder. A relative pattern is looked
up in the current folder, and in the recipe's folder when the current one has no match. Files come sorted by path, each
once, so that two machines with the same files see the same documents in the same order.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import sysconfig
from pathlib import Path

from llmpipe_cli.errors import UsageError

# Installed packages may lie inside the standard library's folder, but are no part of it.
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


def stdlib_dir() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(
    patterns: str | list[str], exclude: str | list[str] | None, base_dir: Path, *, where: str = "files"
) -> list[Path]:
    """The files that any of `patterns` matches and none of `exclude` does, sorted by path.

    A relative `exclude` pattern matches at any depth (``test_*.py``, ``idlelib/*``); its `*` also crosses folders.

    Raises:
        UsageError: when a pattern matches no file, or `exclude` leaves none.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _match(pattern, base_dir)
        if not matches:
            raise UsageError(f"no files match {pattern!r}", where=where, hint=_hint_for_nothing(pattern, base_dir))
        found.update(matches)
    excluded = [_expand(pattern) for pattern in ([exclude] if isinstance(exclude, str) else exclude or [])]
    kept = sorted(path for path in found if not any(_excludes(pattern, path) for pattern in excluded))
    if not kept:
        raise UsageError(
            f"`exclude` leaves none of the {len(found)} files that match", where=where, hint="narrow `exclude`"
        )
    return [Path(path) for path in kept]


def find_folder(name: str, base_dir: Path) -> Path | None:
    """The folder that `name` means, looked up in the current folder, then in `base_dir`; None when there is none."""
    for folder in (Path(name).expanduser(), base_dir / Path(name).expanduser()):
        if folder.is_dir():
            return folder.resolve()
    return None


def _match(pattern: str, base_dir: Path) -> list[str]:
    expanded = _expand(pattern)
    inside_stdlib = "{stdlib}" in pattern
    for folder in (Path.cwd(), base_dir.resolve()):
        full = str(folder / expanded)  # an absolute pattern stays as it is
        matches = glob.glob(full, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
        paths = [os.path.normpath(path) for path in matches if Path(path).is_file()]
        if inside_stdlib:
            skipped = tuple(str(stdlib_dir() / name) + os.sep for name in _PACKAGE_FOLDERS)
            paths = [path for path in paths if not path.startswith(skipped)]
        if paths:
            return paths
    return []


def _expand(pattern: str) -> str:
    # glob.escape: a standard library below a folder with brackets in its name is still found
    return str(Path(pattern.replace("{stdlib}", glob.escape(str(stdlib_dir())))).expanduser())


def _excludes(pattern: str, path: str) -> bool:
    if Path(pattern).is_absolute():
        return fnmatch.fnmatchcase(path, pattern)
    return fnmatch.fnmatchcase(path, f"*/{pattern}")


def _hint_for_nothing(pattern: str, base_dir: Path) -> str:
    """The most helpful next step: a folder given without a pattern, a near name, or the folder that does not exist."""
    expanded = _expand(pattern)
    if (folder := find_folder(expanded, base_dir)) is not None:
        return f"{folder} is a folder; write {pattern.rstrip('/')}/**/* for every file below it"
    path = Path(expanded)
    parent = path.parent if path.is_absolute() else base_dir / path.parent
    if not parent.is_dir():
        parent = Path.cwd() / path.parent
    if not parent.is_dir():
        return f"there is no folder {path.parent}; relative patterns start at {Path.cwd()} or {base_dir.resolve()}"
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_file())
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {path.with_name(near[0])}?"
    return f"{parent.resolve()} holds {len(names)} files" + (f", such as {names[0]}" if names else "")
