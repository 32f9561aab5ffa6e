"""Data cannot speak in the format's voice: what would be read as the end of a turn, or as a speaker's name, is broken up.

What a student reads as a special token is asked of its tokenizer, which may see one where the text has another spelling
(full-width letters, say). Some chat formats mark speakers by plain words, such as [/INST]; they are found in the format.
"""

import re
from collections.abc import Iterable, Sequence

from selfguide_ray.schema import Tokenizer

Spans = list[tuple[int, int]]
SAID = ("qxfirstqx", "qxsecondqx", "qxthirdqx")  # texts whose surroundings are looked at


def escaped(text: str, tokenizer: Tokenizer, words: Sequence[str] = ()) -> str:
    """The text with every special token, and each of the words, broken up by a space; a lone character is dropped."""
    broken: set[str] = set()
    while spans := _apart([*tokenizer.special_spans(text), *occurrences(text, words)]):
        parts, end, now = [], 0, set()
        for start, stop in spans:
            piece = text[start:stop]
            bare = "".join(piece.split())  # a tokenizer may read over white space, so that breaking up cannot help
            parts += [text[end:start], _broken(piece, piece in words, bare in broken)]
            now.add(bare)
            end = stop
        text = "".join([*parts, text[end:]])
        broken |= now
    return text


def _broken(piece: str, word: bool, again: bool) -> str:
    """A word gets its space before the last character, a token after the first; where that did not help, it goes."""
    if again or len(piece) == 1:
        return "" if piece.isspace() else " "
    place = len(piece) - 1 if word else 1
    return f"{piece[:place]} {piece[place:]}"


def _apart(spans: Spans) -> Spans:
    """The spans in order, without those that begin inside another."""
    found: Spans = []
    for start, stop in sorted(spans, key=lambda span: (span[0], -span[1])):
        if stop > start and (not found or start >= found[-1][1]):
            found.append((start, stop))
    return found


def occurrences(text: str, words: Iterable[str]) -> Spans:
    """Where some words stand in a text, the longer ones first."""
    present = sorted((word for word in words if word and word in text), key=len, reverse=True)
    return [m.span() for m in re.finditer("|".join(map(re.escape, present)), text)] if present else []


def role_words(tokenizer: Tokenizer) -> tuple[str, ...]:
    """What a chat format writes between turns besides special tokens, if it is more than a plain word: [/INST], USER:."""
    roles = ("user", "assistant", "user")
    whole = tokenizer.chat([{"role": r, "content": c} for r, c in zip(roles, SAID, strict=True)])
    if whole is None:
        return ()
    found = re.search("(.*)".join([*SAID, ""]), whole, re.DOTALL)
    tokens = "|".join(re.escape(token) for token in sorted(tokenizer.special_tokens, key=len, reverse=True))
    texts = [part for text in found.groups() for part in re.split(tokens, text)] if found else []
    words = (part.strip() for text in texts for part in text.splitlines())
    return tuple(dict.fromkeys(word for word in words if len(word) > 1 and not word.isalnum()))
