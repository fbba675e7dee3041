"""Whether an lmdb's file is as long as its page count says: its C library maps it, and dies (SIGBUS) on a cut one."""

from __future__ import annotations

import struct
from pathlib import Path

from qdeploy.base.errors import PictureError

# lmdb.c: MDB_page (16 bytes), then MDB_meta: magic, version, address, map size, two MDB_db of 48 bytes (the first one's
# md_pad is the page size), last page, transaction. The meta page of the newer transaction counts.
MAGIC = 0xBEEFC0DE
HEADER, META = 16, struct.Struct("<IIQQ48s48sQQ")
VERSIONS = (1, 999)  # of the format; the second is lmdb's own development version
PAGE_SIZES = [2**power for power in range(8, 17)]


def check_lmdb_file(path: Path) -> None:
    """PictureError unless ``path`` is an lmdb file with all of its pages."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        first = _read_meta(file.read(HEADER + META.size), path)
        file.seek(first[0])
        second = _read_meta(file.read(HEADER + META.size), path)
    page_bytes, last_page, _ = max(first, second, key=lambda meta: meta[2])
    if size_bytes < (last_page + 1) * page_bytes:
        raise PictureError(
            f"{path} has {size_bytes:,} bytes, and {last_page + 1:,} pages of {page_bytes} bytes are in it by its own "
            "count: it is cut; copy it again"
        )


def _read_meta(data: bytes, path: Path) -> tuple[int, int, int]:
    """Bytes of a page, number of the last one, and transaction."""
    if len(data) == HEADER + META.size:
        magic, version, _, _, free, _, last_page, transaction = META.unpack(data[HEADER:])
        page_bytes = int.from_bytes(free[:4], "little")
        if magic == MAGIC and version in VERSIONS and page_bytes in PAGE_SIZES:
            return page_bytes, last_page, transaction
    raise PictureError(f"{path} is not a readable lmdb (no header of one); copy it again")
