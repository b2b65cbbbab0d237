r"""From what people and models write to Markdown that shows it. Pure.

The page's Markdown knows HTML, and its own formulas stand between ``$$``, ``\(`` or ``\[``. What
a model wrote must not vanish as an unknown tag, nor fetch a picture from elsewhere.
"""

from __future__ import annotations

import re

FENCED = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)
TAG = re.compile(r"<(?=[A-Za-z/!?])")
FETCHED = re.compile(r"!(?=\[)")
DELIMITED = re.compile(r"\$|\\\(|\\\[")
# A dollar opens a formula before what is no blank, closes it after what is none, and not before a
# digit: "$5 and $6" is money (Pandoc's rule).
INLINE = re.compile(r"(?<![\\$])\$(?=[^\s$])((?:[^$\n\\]|\\.)*?(?<=\S))\$(?![\d$])")
UNSAID = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}(?:\s*\{[^{}]*\})?"
    r"|\\(?:text|textbf|textit|textrm|mbox|operatorname\*?|label|tag)\s*\{[^{}]*\}"
    r"|\\[A-Za-z]+\*?|\\."
)
WORD = re.compile(r"[^\W\d_]{4,}|[\u3000-\u9fff]")
JOINER = "\u2060"  # shows nothing and breaks no line; keeps a tag from being one
DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": r"\[", "right": r"\]", "display": True},
    {"left": r"\(", "right": r"\)", "display": False},
]


def question(text: str) -> str:
    """A visitor's text, as it was typed. ``typed`` gives it back."""
    return TAG.sub(f"<{JOINER}", text).replace("](", f"]{JOINER}(")


def typed(shown: str) -> str:
    """The text that ``question`` shows."""
    return shown.replace(JOINER, "")


def answer(text: str, *, whole: bool = True) -> str:
    """A model's text: formulas as formulas, Markdown as Markdown, tags as text.

    Args:
        text: What was said.
        whole: Whether there will be no more; half a formula is shown as it is written.
    """
    if is_formula(text):
        return f"$$\n{text.strip()}\n$$" if whole and balanced(text) else code(text)
    pieces = FENCED.split(text)  # code stands at odd places
    pieces[::2] = [_prose(piece) for piece in pieces[::2]]
    return "".join(pieces)


def is_formula(text: str) -> bool:
    """Whether a text is LaTeX from end to end, without the signs that would say so."""
    if DELIMITED.search(text) or "`" in text or "<" in re.sub(r"(?<=\s)<(?=\s)|\\<", "", text):
        return False
    if not re.search(r"\\[A-Za-z]+|[\^_]\s*[{\w\\]", text):
        return False
    # Letters of a spelled-out word, as labels with a blank after each token have them, are no word.
    return WORD.search(UNSAID.sub(" ", text)) is None


def balanced(text: str) -> bool:
    """Whether every brace that opens is closed."""
    depth = 0
    for sign in re.findall(r"(?<!\\)(?:\\\\)*([{}])", text):
        depth += 1 if sign == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def code(text: str, language: str = "") -> str:
    """A text exactly as it is, with a button that copies it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _prose(text: str) -> str:
    text = INLINE.sub(lambda found: rf"\({found[1]}\)", text)
    return TAG.sub("&lt;", FETCHED.sub("&#33;", text))
