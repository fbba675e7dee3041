"""The check of the documentation's words finds what it is for, and finds nothing in this repository."""

from __future__ import annotations

import pytest

from scripts.docs.prose import MAX_PARAGRAPH_WORDS, MAX_SENTENCE_WORDS, check_lengths, check_words, list_faults


def test_nothing_is_left_to_change() -> None:
    assert list(list_faults()) == []


@pytest.mark.parametrize("text", ["the float twin of", "Its sampler", "what it puts out", "beside it", "behind a fork"])
def test_words_of_their_own_are_found(text: str) -> None:
    assert len(list(check_words(text))) == 1


@pytest.mark.parametrize("text", ["behind a build option", "next to it", "the scheduler", "output"])
def test_plain_words_are_not(text: str) -> None:
    assert list(check_words(text)) == []


def test_long_sentences_and_paragraphs_are_found_but_not_tables_and_code() -> None:
    words = "word " * (MAX_SENTENCE_WORDS + 1)
    assert len(list(check_lengths(words))) == 1
    assert list(check_lengths(f"| {words} |\n\n# {words}\n\n```text\n{words}\n```")) == []
    assert len(list(check_lengths("A word. " * MAX_PARAGRAPH_WORDS))) == 1
    assert list(check_lengths("A word. " * 10)) == []
