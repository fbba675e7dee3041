"""Types of arrays that several dtypes fit; an array of one dtype is written out, ``NDArray[np.float32]``."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

AnyArray = NDArray[np.generic]  # of any dtype
Feeds = Mapping[str, AnyArray]  # a graph's inputs by name: token codes int64, latents float32
