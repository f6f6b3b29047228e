"""``python -m llmpipe_cli`` is the same as ``llmpipe``."""

from __future__ import annotations

from llmpipe_cli.cli.app import main

main()
