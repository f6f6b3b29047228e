"""Which files a recipe's glob patterns mean, always in the same order.

`{stdlib}` stands for the folder of Python's standard library, `{recipes}` for that of the ready recipes, whose small
data sets lie in `{recipes}/data`, and `~` for the home folder. A relative pattern is looked up in the current folder,
and in the recipe's folder when the current one has no match. Files come sorted by path, each once, so that two machines
with the same files see the same documents in the same order.
"""

from __future__ import annotations

import difflib
import fnmatch
import glob
import os
import sysconfig
from pathlib import Path

from llmpipe_cli.errors import UsageError
from llmpipe_cli.recipe.builtin import builtin_folder

# Installed packages may lie inside the standard library's folder, but are no part of it.
_PACKAGE_FOLDERS = ("site-packages", "dist-packages")


def stdlib_dir() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def find_files(
    patterns: str | list[str], exclude: str | list[str] | None, base_dir: Path, *, where: str = "files"
) -> list[Path]:
    """The files that any of `patterns` matches and none of `exclude` does, sorted by path.

    A relative `exclude` pattern matches at any depth below the folder where the pattern of `patterns` begins to vary
    (``test_*.py``, ``idlelib/*``); an absolute one is compared with whole paths. Its `*` also crosses folders.

    Raises:
        UsageError: when a pattern matches no file, or `exclude` leaves none.
    """
    excluded = [_expand(pattern) for pattern in ([exclude] if isinstance(exclude, str) else exclude or [])]
    num_found = 0
    kept: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        root, paths = _match(pattern, base_dir)
        if not paths:
            raise UsageError(f"no files match {pattern!r}", where=where, hint=_hint_for_nothing(pattern, base_dir))
        num_found += len(paths)
        kept.update(path for path in paths if not any(_excludes(other, path, root) for other in excluded))
    if not kept:
        raise UsageError(
            f"`exclude` leaves none of the {num_found} files that match", where=where, hint="narrow `exclude`"
        )
    return [Path(path) for path in sorted(kept)]


def find_folder(name: str, base_dir: Path) -> Path | None:
    """The folder that `name` means, looked up in the current folder, then in `base_dir`; None when there is none."""
    for folder in (Path(name).expanduser(), base_dir / Path(name).expanduser()):
        if folder.is_dir():
            return folder.resolve()
    return None


def find_folder_or_id(name: str, base_dir: Path, *, where: str) -> Path | None:
    """The folder that `name` means, or None when it can only be a hub id.

    Raises:
        UsageError: `name` is written as a path, and there is no such folder.
    """
    folder = find_folder(name, base_dir)
    if folder is None and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(
            f"there is no folder {name}",
            where=where,
            hint=f"relative names start at {Path.cwd()} or {base_dir.resolve()}",
        )
    return folder


def _match(pattern: str, base_dir: Path) -> tuple[str, list[str]]:
    """The folder below which the pattern varies, and the files that match."""
    expanded = _expand(pattern)
    inside_stdlib = "{stdlib}" in pattern
    for folder in (Path.cwd(), base_dir.resolve()):
        full = str(folder / expanded)  # an absolute pattern stays as it is
        matches = glob.glob(full, recursive=True)  # noqa: PTH207  (Path.glob takes no absolute pattern)
        if inside_stdlib:
            skipped = tuple(str(stdlib_dir() / name) + os.sep for name in _PACKAGE_FOLDERS)
            matches = [path for path in matches if not path.startswith(skipped)]
        paths = [os.path.normpath(path) for path in matches if Path(path).is_file()]
        if paths:
            return _fixed_part(full), paths
    return "", []


def _expand(pattern: str) -> str:
    if "{recipes}" in pattern:
        pattern = pattern.replace("{recipes}", glob.escape(str(builtin_folder("recipes"))))
    # glob.escape: a standard library below a folder with brackets in its name is still found
    return str(Path(pattern.replace("{stdlib}", glob.escape(str(stdlib_dir())))).expanduser())


def _fixed_part(pattern: str) -> str:
    parts = []
    for part in Path(pattern).parent.parts:
        if glob.has_magic(part) and not glob.has_magic(part.replace("[[]", "")):  # an escaped bracket
            part = part.replace("[[]", "[")
        elif glob.has_magic(part):
            break
        parts.append(part)
    return os.path.normpath(Path(*parts))


def _excludes(pattern: str, path: str, root: str) -> bool:
    if Path(pattern).is_absolute():
        return fnmatch.fnmatchcase(path, pattern)
    below = "/" + path.removeprefix(root).lstrip("/")
    return fnmatch.fnmatchcase(below, "*/" + pattern.removeprefix("**/").removeprefix("./"))


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
