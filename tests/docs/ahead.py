"""Where the documentation is ahead of the code. Each entry fails as soon as the code has caught up: then delete it."""

from __future__ import annotations

OPTIONS: dict[tuple[str, str], str] = {}  # (command, documented option) -> what the code has
RECIPE_KEYS: dict[str, str] = {}
VARIABLES: set[str] = set()
PATHS: set[str] = set()
