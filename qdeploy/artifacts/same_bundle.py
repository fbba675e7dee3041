"""Whether a machine of a cluster has the same bundle at the same path as the one that sends the work."""

from __future__ import annotations

import platform
from pathlib import Path

from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.errors import BundleError
from qdeploy.base.files import hash_file


def check_same_bundle(folder: Path, sha256: str) -> None:
    """BundleError unless the manifest of ``folder``, which holds the hashes of all else, has this hash."""
    if not (folder / MANIFEST).is_file() or hash_file(folder / MANIFEST) != sha256:
        raise BundleError(
            f"{folder} on {platform.node()} is not the bundle to use; put the same one at that path on every machine "
            "of the cluster, for instance on a shared disk"
        )
