"""Where the documentation is ahead of the code. Each entry fails as soon as the code has caught up: then delete it."""

from __future__ import annotations

OPTIONS = {("calibrate", "--scheduler"): "--sampler"}  # (command, documented option) -> what the code has
RECIPE_KEYS = {"scheduler": "sampler"}
VARIABLES: set[str] = set()
PATHS = {
    "qdeploy/artifacts/",
    "qdeploy/base/",
    "qdeploy/inspection/",
    "qdeploy/reporting/",
    "qdeploy/targets/",
    "qdeploy/targets/NAME.py",
}
