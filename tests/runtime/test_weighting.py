"""(word:1.3): the grammar, what the embeddings get, and that it is off unless asked for."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.weighting import apply_weights, parse_weights


def pieces(prompt: str) -> list[tuple[str, float]]:
    """Runs of equal weight."""
    weighted_text = parse_weights(prompt)
    runs: list[tuple[str, float]] = []
    for character, weight in zip(weighted_text.text, weighted_text.weights, strict=True):
        if runs and runs[-1][1] == round(weight, 4):
            runs[-1] = (runs[-1][0] + character, runs[-1][1])
        else:
            runs.append((character, round(weight, 4)))
    return runs


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("a [red] cat", [("a ", 1), ("red", 0.9091), (" cat", 1)]),
        ("((a:2) b:0.5)", [("a", 1.0), (" b", 0.5)]),
        (r"a \(red\) \[cat\] \\", [(r"a (red) [cat] \\"[:-1], 1)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("literal) and]", [("literal) and]", 1)]),
        ("at 10:30 (ratio 3:2)", [("at 10:30 ", 1), ("ratio 3", 2)]),
        ("(漢字:1.5)🙂", [("漢字", 1.5), ("🙂", 1)]),
    ],
)
def test_grammar(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]


def test_the_web_uis_own_example() -> None:
    """From the docstring of ``parse_prompt_attention``."""
    actual = pieces("a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).")
    expected = [
        ("a ", 1.0), ("house", 1.5730), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55), (", sun, ", 1.1),
        ("sky", 1.4641), (".", 1.1),
    ]  # fmt: skip
    assert [(text, pytest.approx(weight, abs=1e-4)) for text, weight in expected] == actual


def test_the_mean_is_restored_prompt_by_prompt() -> None:
    hidden = np.random.default_rng(0).standard_normal((2, 5, 3), np.float32) + 1
    weights = np.ones((2, 5), np.float32)
    weights[0, 1:3] = 1.5
    actual = apply_weights(hidden, weights)
    expected = hidden[0] * weights[0][:, None]
    assert np.allclose(actual[0], expected * hidden[0].mean() / expected.mean(), rtol=1e-5)
    assert np.array_equal(actual[1], hidden[1])


def test_weighting_is_an_option(pipe: Pipeline) -> None:
    settings = dict(steps=3, seed=1)
    plain = pipe("a red cat", **settings).latents
    assert np.array_equal(pipe("a red cat", weighting=True, **settings).latents, plain)
    assert np.array_equal(pipe("a (red:1) cat", weighting=True, **settings).latents, plain)
    assert not np.array_equal(pipe("a (red:1.5) cat", weighting=True, **settings).latents, plain)
    assert not np.array_equal(pipe("a (red:1) cat", **settings).latents, plain)


def test_only_the_words_tokens_are_weighted(pipe: Pipeline) -> None:
    tokens = pipe.model.tokenizers["text_encoder"].encode(
        [parse_weights("a (é:2)b")]
    )  # one token a byte: start a é é b end
    assert tokens.weights[0][:7].tolist() == [1, 1, 2, 2, 1, 1, 1]
