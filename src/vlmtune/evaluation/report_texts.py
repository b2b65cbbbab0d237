"""What is wrong in an answer, marked character by character."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Indel, Levenshtein

from vlmtune.evaluation.markup import Html, group, tag

LONGEST = 1200  # characters of a text that are shown
SAME = 2  # an equal stretch this short between two faults is chance, not agreement


def cut(text: str) -> str:
    """A text's first characters, and how many more there are."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} … and {len(text) - LONGEST:,} more characters"


def shown(text: str) -> Html:
    """A text as it is."""
    return group([cut(text)]) if text else tag("em", "empty", class_="muted")


def closest(answer: str, truth: Sequence[str]) -> str:
    """The accepted answer that an answer is most like."""
    return max(truth, key=lambda text: Levenshtein.normalized_similarity(answer, text))


def faults(answer: str, truth: Sequence[str]) -> Html:
    """The answer with what should not be there marked, and what is missing struck in.

    It is compared with the closest reference, character by character, in the first 1200 characters
    of both; where one of them is longer, that is said.
    """
    if not truth:
        return shown(answer)
    nearest = closest(answer, truth)
    expected, written = nearest[:LONGEST], answer[:LONGEST]
    pieces: list[str] = []
    for missing, extra, same in differences(expected, written):
        pieces += [
            tag("del", missing, title="missing") if missing else "",
            tag("ins", extra, title="not in the truth") if extra else "",
            same,
        ]
    if not written:
        pieces.insert(0, tag("em", "empty ", class_="muted"))
    if max(len(answer), len(nearest)) > LONGEST:
        words = (
            f" … compared in their first {LONGEST:,} characters: the answer has {len(answer):,}, "
            f"the truth {len(nearest):,}"
        )
        pieces.append(tag("em", words, class_="muted"))
    return group(pieces)


def differences(expected: str, written: str) -> list[tuple[str, str, str]]:
    """Runs of (missing, extra, same): with ``same``, they spell ``expected`` and ``written``.

    The longest common subsequence, but for stretches too short to mean agreement. difflib's would
    take seconds where a model repeats itself.
    """
    runs: list[tuple[str, str, str]] = []
    at_expected = at_written = 0
    for start, begin, size in Indel.editops(expected, written).as_matching_blocks():
        inner = size and (start, begin) != (0, 0) and start + size < len(expected)
        if inner and len(written[begin : begin + size].strip()) < SAME:
            continue
        missing, extra = expected[at_expected:start], written[at_written:begin]
        if missing or extra or size:
            runs.append((missing, extra, written[begin : begin + size]))
        at_expected, at_written = start + size, begin + size
    return runs
