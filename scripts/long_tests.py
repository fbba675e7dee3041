"""Write tests/long.txt, the tests that `make check` leaves out for their time, from a run's JUnit file.

    make test PYTEST_OPTIONS=--junitxml=build/tests.xml
    python -m scripts.long_tests build/tests.xml

One line a test function, whatever its parameters. Tests that trace graphs are left out anyway, by their mark.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
LIST = ROOT / "tests" / "long.txt"
CASE_S, FUNCTION_S = 0.5, 2.0  # longer than the first in one case, or than the second in all cases together


def main() -> None:
    """Read the JUnit file and replace the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, help="what pytest's --junitxml has written")
    cases = read_cases(parser.parse_args().junit)
    LIST.write_text("".join(f"{name}\n" for name in find_long(cases)), encoding="utf-8")


def read_cases(junit: Path) -> list[tuple[str, float]]:
    """``(FILE::FUNCTION, seconds)`` of every case, as pytest names them."""
    return [
        (
            f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name'].partition('[')[0]}",
            float(case.attrib["time"]),
        )
        for case in ElementTree.parse(junit).iter("testcase")
    ]


def find_long(cases: Iterable[tuple[str, float]]) -> list[str]:
    """The functions that take long, in order."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for name, taken in cases:
        seconds[name].append(taken)
    return sorted(name for name, taken in seconds.items() if max(taken) > CASE_S or sum(taken) > FUNCTION_S)


if __name__ == "__main__":
    main()
