"""Built TensorRT engines on disk ("plans"): the key that one was built from, and loading only a matching one.

A plan contains native code that TensorRT runs unchecked, so only two kinds are read: those in this user's own cache,
and those that a bundle's manifest lists with their SHA-256, if this user built them or trusts their author
(``QDEPLOY_TRUST_PLANS``). Its key is stored next to each plan, and every part of it must match.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from qdeploy.artifacts.bundle_files import FileEntry
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import EngineError
from qdeploy.base.files import hash_file, stage_file
from qdeploy.engines.nvidia.profiles import Profile

PLAN_SUFFIX = ".plan"
KEY_SUFFIX = ".key.json"
BUILT_SUFFIX = ".built"
TRUST_VARIABLE = "QDEPLOY_TRUST_PLANS"  # "1": run a bundle's plans, whoever built them; "0": build again instead
GRAPH_SUFFIXES = ("", ".data")  # the graph and its weights, which the exporter stores next to it
MISMATCH_TEXTS = {
    "onnx_sha256": "another graph",
    "tensorrt": "TensorRT {:.40}",
    "sm": "a GPU of SM {:.40}",
    "profile": "the shapes {:.200}",
    "strongly_typed": "strong typing {}",
}


@dataclass(frozen=True)
class PlanKey:
    """Everything that a plan depends on.

    onnx_sha256: of the graph and its weights. sm: compute capability of the GPU, "9.0". profile: canonical JSON.
    """

    onnx_sha256: str
    tensorrt: str
    sm: str
    profile: str
    strongly_typed: bool = True

    @property
    def digest(self) -> str:
        """Hex SHA-256 over all of it: the plan's name in the cache."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def check(self, stored: PlanKey, where: Path) -> None:
        """EngineError that names what the plan at ``where``, whose key is ``stored``, was built for."""
        built_for = [
            MISMATCH_TEXTS[name].format(getattr(stored, name))
            for name in (field.name for field in fields(self))
            if getattr(stored, name) != getattr(self, name)
        ]
        if built_for:
            here = f"TensorRT {self.tensorrt}, SM {self.sm}, shapes {self.profile}"
            raise EngineError(
                f"{where} was built for {' and '.join(built_for)}, but here is {here}; export the bundle again, with "
                "--build on this machine or without it"
            )


@dataclass(frozen=True)
class StoredPlanKey(PlanKey):
    """The key as it lies next to a plan, with the plan's own hash."""

    plan_sha256: str = ""


@dataclass(frozen=True)
class ListedFiles:
    """What a plan needs of a manifest, which was checked as a whole when the bundle was opened."""

    files: tuple[FileEntry, ...]


def build_key(graph: Path, profile: Profile, tensorrt: str, sm: tuple[int, int]) -> PlanKey:
    """The key of the plan that would be built of ``graph`` here."""
    digest = hashlib.sha256()
    for suffix in GRAPH_SUFFIXES:
        file = graph.with_name(graph.name + suffix)
        if file.is_file():
            digest.update(f"{suffix} {hash_file(file)}\n".encode())
    shapes = {name: [list(shape) for shape in profile[name]] for name in sorted(profile)}
    return PlanKey(digest.hexdigest(), tensorrt, f"{sm[0]}.{sm[1]}", json.dumps(shapes, separators=(",", ":")))


def read_bundled_plan(graph: Path, key: PlanKey, cache: Path) -> bytes | None:
    """The plan next to ``graph``, or None; EngineError when it does not match or is not trusted.

    cache: this user's, in which ``record_built`` lists the plans built here.
    """
    plan = graph.with_suffix(PLAN_SUFFIX)
    trust = os.environ.get(TRUST_VARIABLE, "")
    if not plan.is_file() or trust == "0":
        return None
    listed = _read_listed_sha256(graph.parent.parent, plan)
    if listed is None:
        raise EngineError(
            f"{plan} is listed in no bundle's manifest, so its native code is not trusted; remove it, or export "
            "the bundle again with --build"
        )
    content = _read_checked(plan, key, listed)
    if trust != "1" and not (cache / f"{listed}{BUILT_SUFFIX}").is_file():
        raise EngineError(
            f"{plan} was not built by this user on this machine, and TensorRT runs its native code unchecked; set "
            f"{TRUST_VARIABLE}=1 only if you would run a program of the bundle's author, or {TRUST_VARIABLE}=0 to "
            "build the engine here"
        )
    return content


def record_built(cache: Path, content: bytes) -> None:
    """Record in this user's ``cache`` that a plan was built here, so that it is trusted in a bundle too."""
    (cache / f"{hashlib.sha256(content).hexdigest()}{BUILT_SUFFIX}").touch()


def read_cached_plan(folder: Path, key: PlanKey) -> bytes | None:
    """The plan of ``key`` in this user's cache ``folder``, or None where there is none yet."""
    plan = folder / f"{key.digest}{PLAN_SUFFIX}"
    return _read_checked(plan, key, None) if plan.is_file() else None


def cache_plan(folder: Path, key: PlanKey, content: bytes) -> Path:
    """Put a plan in the cache ``folder``."""
    return write_plan(folder / f"{key.digest}{PLAN_SUFFIX}", key, content)


def write_plan(plan: Path, key: PlanKey, content: bytes) -> Path:
    """Write a plan with its key; the plan last, so that none exists without a key."""
    document = {**asdict(key), "plan_sha256": hashlib.sha256(content).hexdigest()}
    with stage_file(plan.with_suffix(KEY_SUFFIX)) as scratch:
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with stage_file(plan) as scratch:
        scratch.write_bytes(content)
    return plan


def _read_checked(plan: Path, key: PlanKey, listed_sha256: str | None) -> bytes:
    """The plan's bytes when its key agrees with ``key`` and its hash with its key's, and the manifest's where given."""
    remedy = f"remove {plan.name}, it will be built again"
    stored = read_json_as(plan.with_suffix(KEY_SUFFIX), StoredPlanKey, error=EngineError, remedy=remedy)
    key.check(stored, plan)
    content = plan.read_bytes()
    actual = hashlib.sha256(content).hexdigest()
    if actual != stored.plan_sha256 or (listed_sha256 is not None and actual != listed_sha256):
        raise EngineError(f"{plan} was changed: its SHA-256 is not the one it was written with; remove it")
    return content


def _read_listed_sha256(bundle: Path, plan: Path) -> str | None:
    """What the bundle's manifest says of the plan."""
    if not (bundle / MANIFEST).is_file():
        return None
    remedy = "export the bundle again"
    document = read_json_as(bundle / MANIFEST, ListedFiles, error=EngineError, remedy=remedy, allow_unknown=True)
    listed = {entry.path: entry.sha256 for entry in document.files}
    return listed.get(plan.relative_to(bundle).as_posix())
