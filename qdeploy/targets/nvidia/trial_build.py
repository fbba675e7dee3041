"""Check that TensorRT's own library accepts a graph: TensorRT-RTX parses and builds it ahead of time, without a GPU.

The library is C++ without a C interface, and compilers and headers are not for every machine, so that its few
methods are called here through their slots in the virtual tables (Itanium ABI: a pointer to the table comes first,
a virtual destructor takes two slots). The slots are those of TensorRT 11.1's public headers, NvInferImpl.h,
NvInferRuntime.h and NvOnnxParser.h; no other version of the library is ever called. A program of its own
(``python -m qdeploy.targets.nvidia.trial_build GRAPH``) does it, because a mistake of theirs or ours would crash it.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qdeploy.base.errors import AuditError, EngineUnavailableError

PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"
VERSION = "1.7.1"
VERSION_NUMBER = 10701
INSTALL = "on Linux x86-64, run `pip install 'qdeploy[tensorrt-rtx]'`"
LIMIT_S = 1800

# Slots in the virtual tables
BUILDER_CREATE_CONFIG, BUILDER_CREATE_NETWORK, BUILDER_BUILD, BUILDER_GET_LOGGER = 5, 6, 11, 13  # apiv::VBuilder
PARSER_PARSE_FROM_FILE, PARSER_GET_NB_ERRORS, PARSER_GET_ERROR = 1, 3, 4  # nvonnxparser::IParser
ERROR_DESC, ERROR_NODE_NAME, ERROR_NODE_OPERATOR = 1, 6, 7  # nvonnxparser::IParserError
MEMORY_SIZE = 3  # apiv::VHostMemory
STRONGLY_TYPED = 1  # 1 << NetworkDefinitionCreationFlag::kSTRONGLY_TYPED
ERROR = 1  # ILogger::Severity; 0 is INTERNAL_ERROR

LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)


class LoggerTable(ctypes.Structure):
    """Virtual table of ``ILogger``; the library calls only its last function."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("language", "interface", "destroy", "delete")] + [
        ("log", LogFunction)
    ]


@dataclass(frozen=True)
class TrialBuild:
    """Result of the library on a graph."""

    library: str
    parse_s: float
    build_s: float
    engine_bytes: int


def build_on_trial(path: Path) -> TrialBuild:
    """Parse the ONNX file at ``path`` and build its engine; no profile, so its shapes must be static.

    Raises EngineUnavailableError where the library is not installed, and AuditError with its own words
    where it refuses the graph.
    """
    find_library_folder()
    command = [sys.executable, "-m", "qdeploy.targets.nvidia.trial_build", str(path)]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as exc:
        raise AuditError(f"TensorRT-RTX {VERSION} did not build {path} within {LIMIT_S} s") from exc
    try:
        answer = json.loads(completed.stdout.splitlines()[-1])
    except (IndexError, ValueError) as exc:
        raise AuditError(
            f"TensorRT-RTX {VERSION} ended with status {completed.returncode} on {path}: "
            f"{completed.stderr[-2000:].strip()}"
        ) from exc
    if "errors" in answer:
        raise AuditError(f"TensorRT-RTX {VERSION} refuses {path}: {'; '.join(answer['errors'])}")
    return TrialBuild(**answer)


def find_library_folder() -> Path:
    """Where the two libraries of the right version lie; EngineUnavailableError when they do not."""
    module_spec = find_spec(PACKAGE)
    if module_spec is None or module_spec.origin is None:
        raise EngineUnavailableError(f"TensorRT-RTX is not installed; {INSTALL}")
    folder = Path(module_spec.origin).parent
    missing = [path.name for path in list_libraries(folder) if not path.is_file()]
    if missing:
        raise EngineUnavailableError(f"{folder} has no {' and '.join(missing)}; {INSTALL} for version {VERSION}")
    return folder


def list_libraries(folder: Path) -> tuple[Path, Path]:
    """The core and the ONNX parser."""
    return folder / f"libtensorrt_rtx.so.{VERSION}", folder / f"libtensorrt_onnxparser_rtx.so.{VERSION}"


def build_engine(path: Path) -> TrialBuild | list[str]:
    """Parse and build in this process; the library's errors when it refuses."""
    core, parsers = (ctypes.CDLL(str(library)) for library in list_libraries(find_library_folder()))
    if core.getInferLibVersion() != VERSION_NUMBER:
        return [f"the library says that it is {core.getInferLibVersion()}, expected {VERSION_NUMBER}"]
    errors: list[str] = []

    def log(_: int, severity: int, message: bytes) -> None:
        if severity <= ERROR:
            errors.append(message.decode(errors="replace").strip())

    table = LoggerTable(log=LogFunction(log))
    logger = ctypes.pointer(ctypes.pointer(table))
    address = ctypes.cast(logger, ctypes.c_void_p)
    builder = get_implementation(bind_function(core, "createInferBuilder_INTERNAL", 2)(address, VERSION_NUMBER))
    if bind_method(builder, BUILDER_GET_LOGGER)() != address.value:
        return ["the library's builder does not have the layout of its version's headers"]
    network = bind_method(builder, BUILDER_CREATE_NETWORK, ctypes.c_uint32)(STRONGLY_TYPED)
    parser = bind_function(parsers, "createNvOnnxParser_INTERNAL", 3)(network, address, VERSION_NUMBER)
    start = time.perf_counter()
    parse = bind_method(parser, PARSER_PARSE_FROM_FILE, ctypes.c_char_p, ctypes.c_int, result=ctypes.c_bool)
    if not parse(str(path).encode(), ERROR):
        return list(list_parser_errors(parser)) or errors
    parsed = time.perf_counter()
    config = bind_method(builder, BUILDER_CREATE_CONFIG)()
    memory = bind_method(builder, BUILDER_BUILD, ctypes.c_void_p, ctypes.c_void_p)(network, config)
    if memory is None:
        return errors or ["no engine, and no reason given"]
    engine_bytes = bind_method(get_implementation(memory), MEMORY_SIZE, result=ctypes.c_size_t)()
    return TrialBuild(f"TensorRT-RTX {VERSION}", parsed - start, time.perf_counter() - parsed, engine_bytes)


def list_parser_errors(parser: int) -> list[str]:
    """Each of the parser's errors with the node that it is about."""
    errors = []
    for number in range(bind_method(parser, PARSER_GET_NB_ERRORS, result=ctypes.c_int)()):
        error = bind_method(parser, PARSER_GET_ERROR, ctypes.c_int)(number)
        texts = [
            bind_method(error, index, result=ctypes.c_char_p)()
            for index in (ERROR_NODE_NAME, ERROR_NODE_OPERATOR, ERROR_DESC)
        ]
        name, operator, text = ((part or b"").decode(errors="replace") for part in texts)
        errors.append(f"{name} ({operator}): {text}")
    return errors


def bind_function(library: ctypes.CDLL, name: str, arguments: int) -> Callable[..., Any]:
    """A C function that takes pointers, its last argument a version number, and returns a pointer."""
    bound: ctypes._NamedFuncPointer = getattr(library, name)
    bound.argtypes = [ctypes.c_void_p] * (arguments - 1) + [ctypes.c_int]
    bound.restype = ctypes.c_void_p
    return bound


def bind_method(this: int, index: int, *arguments: Any, result: Any = ctypes.c_void_p) -> Callable[..., Any]:
    """The virtual method in slot ``index`` of the object at address ``this``, bound to it."""
    table = ctypes.c_void_p.from_address(this).value
    assert table is not None
    address = ctypes.c_void_p.from_address(table + index * ctypes.sizeof(ctypes.c_void_p)).value
    assert address is not None
    call = ctypes.CFUNCTYPE(result, ctypes.c_void_p, *arguments)(address)
    return lambda *values: call(this, *values)


def get_implementation(outer: int) -> int:
    """The implementation (``mImpl``) of an object of the public classes: their second word."""
    address = ctypes.c_void_p.from_address(outer + ctypes.sizeof(ctypes.c_void_p)).value
    assert address is not None
    return address


def main() -> None:
    """Build the graph that the first argument names; prints the answer as JSON for the parent process."""
    answer = build_engine(Path(sys.argv[1]))
    print(json.dumps({"errors": answer} if isinstance(answer, list) else asdict(answer)))


if __name__ == "__main__":
    main()
