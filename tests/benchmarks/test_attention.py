"""Every form of attention that is timed computes attention."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.attention import BATCH, FORMS, HEADS, open_session
from qdeploy.base.numerics import sqnr_db

LENGTH, DEPTH = 512, 8


@pytest.mark.parametrize("form", FORMS)
def test_it_is_attention(form: str) -> None:
    noise = np.random.default_rng(0)
    q, k, v = (noise.standard_normal((BATCH, LENGTH, HEADS * DEPTH)).astype(np.float32) for _ in range(3))
    split = [x.reshape(BATCH, LENGTH, HEADS, DEPTH).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) * np.float32(DEPTH**-0.5)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights / weights.sum(axis=-1, keepdims=True) @ split[2]
    actual = open_session(form, LENGTH, DEPTH, 1).run(None, {"q": q, "k": k, "v": v})[0]
    least = 25 if "integer" in form else 100
    assert sqnr_db(expected.transpose(0, 2, 1, 3).reshape(BATCH, LENGTH, -1), actual) > least
