"""Normal forms of answers for the metrics of generated text: words, numbers, yes and no, boxes."""

from __future__ import annotations

import re

ARTICLES = ("a", "an", "the")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}
"""Words that the VQA evaluation writes as digits."""
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""Characters that the VQA evaluation removes; full stops and apostrophes have rules of their own."""
_CONTRACTED = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't shouldn't
wasn't weren't won't wouldn't could've might've must've should've would've i'm i've he's it'd it'll let's ma'am o'clock
she's somebody's someone's something's that's there's they'd they'll they're they've y'all you'd you'll you're you've
we've what'll what's when's where's who'd who'll who's why's
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
"""Contractions whose apostrophe is missing, and how the VQA evaluation writes them."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")


def collapsed(text: str) -> str:
    """Lower case, with single blanks."""
    return " ".join(text.lower().split())


def vqa_normalized(text: str) -> str:
    """An answer as the VQA evaluation compares it: without articles and punctuation, number words as digits.

    Punctuation beside a blank is removed, other punctuation becomes a blank; a comma between digits makes all of it
    disappear. Full stops stay between digits only.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    removes = re.search(r"\d,\d", text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if removes or beside else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = [NUMBER_WORDS.get(word, word) for word in cleaned.split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def as_number(text: str) -> float | None:
    """The number that a text is: `1,200`, `-3.5`, `12 %` (0.12); None if it is anything else."""
    text = text.strip().rstrip(".")
    percent = text.endswith("%")
    match = _NUMBER.fullmatch(text.removesuffix("%").strip())
    return None if match is None else float(match.group().replace(",", "")) / (100 if percent else 1)


def first_number(text: str) -> float | None:
    """The first number in a text, or the number that it is as a word (`three`); None without one."""
    match = _NUMBER.search(text)
    if match is not None:
        return float(match.group().replace(",", ""))
    word = next((word for word in re.findall(r"[a-z]+", text.lower()) if word in NUMBER_WORDS), None)
    return None if word is None else float(NUMBER_WORDS[word])


def yes_or_no(text: str) -> bool | None:
    """Whether an answer says yes, by POPE's rule: there is no `no` and no `not` in its first sentence.

    Args:
        text: the answer; None is returned for an empty one.
    """
    words = re.findall(r"[\w']+", text.partition(".")[0].lower())
    return None if not words else not {"no", "not"} & set(words)


def box_of(text: str) -> tuple[float, float, float, float] | None:
    """The box [x1, y1, x2, y2] in a text: its first four numbers; None if there are fewer."""
    found = [float(number) for number in re.findall(r"-?\d+\.?\d*", text)[:4]]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None
