"""recipe.lock.yaml: the recipe of a run with everything resolved, and what it ran with.

A lock file is a recipe: `load_recipe` reads it, so ``llmpipe train runs/NAME/recipe.lock.yaml`` repeats a run. Its
section `lock` holds the versions of the packages that decide numbers and the fingerprints of the prepared data; nothing
of the environment goes in, so no token or host name can.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from llmpipe_cli import __version__
from llmpipe_cli.recipe.schema import Recipe

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "tokenizers", "safetensors")


def installed_versions() -> dict[str, str | None]:
    """Versions of Python, llmpipe and `PACKAGES`, read without importing them; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "llmpipe": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def lock_text(recipe: Recipe, data: Mapping[str, Any] | None = None) -> str:
    """The text of a lock file.

    Args:
        recipe: with every `auto` that is decided replaced by its value.
        data: fingerprints of the prepared data, plain values only, for example ``{"train": {"fingerprint": "9f2c"}}``.
    """
    content = _without_unset(recipe.model_dump(mode="json", by_alias=True))
    if recipe.model.config is not None:  # its own null values have a meaning
        content["model"]["config"] = recipe.model.config
    content["lock"] = {"versions": installed_versions(), "data": dict(data or {})}
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 120
    stream = StringIO()
    stream.write("# Written by llmpipe: every default resolved. This file is a recipe too.\n")
    yaml.dump(content, stream)
    return stream.getvalue()


def write_lock(path: Path, recipe: Recipe, data: Mapping[str, Any] | None = None) -> None:
    """Writes a lock file; see `lock_text`."""
    path.write_text(lock_text(recipe, data), encoding="utf-8")


def _without_unset(value: Any) -> Any:
    """`value` without the entries that are None: in a recipe they are left out."""
    if isinstance(value, dict):
        return {key: _without_unset(item) for key, item in value.items() if item is not None}
    return value
