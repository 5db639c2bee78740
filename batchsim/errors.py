"""What can go wrong, and how it is told.

BatchSimError
├── InputError    refused input: a scenario, a profile or an option; exit code 2
└── RunError      a run that failed on input that was accepted; exit code 1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec


class BatchSimError(Exception):
    """The parent of every error that BatchSim raises on purpose; its text is for the user, one sentence a line."""


class InputError(BatchSimError):
    """Input refused: which file, which key, what was found there, and what would do.

    `file` is a path or an option such as `--set`, and None where the reader of a value does not know it (`within`
    fills it in); `key` is a dotted path, or empty for the file as a whole. One error may stand for several:
    `problems` holds all of them, and the text has a line for each.
    """

    def __init__(self, file: str | None, key: str, found: str, wanted: str, *, line: int | None = None) -> None:
        super().__init__(file, key, found, wanted)
        self.file = file
        self.key = key
        self.found = found
        self.wanted = wanted
        self.line = line
        self.problems: tuple[InputError, ...] = (self,)

    @classmethod
    def all_of(cls, problems: Iterable[InputError]) -> InputError:
        """One error that stands for all of `problems`, of which there is at least one."""
        first, *rest = problems
        first.problems = (first, *rest)
        return first

    def within(self, file: str) -> InputError:
        """This error, with `file` named where no file was."""
        for problem in self.problems:
            problem.file = problem.file or file
        return self

    @property
    def sentence(self) -> str:
        """This problem alone."""
        place = [self.file or "input"]
        if self.line is not None:
            place[0] += f":{self.line}"
        if self.key:
            place.append(self.key)
        return f"{': '.join(place)}: found {self.found}, wanted {self.wanted}"

    def __str__(self) -> str:
        return "\n".join(problem.sentence for problem in self.problems)


class RunError(BatchSimError):
    """A run that failed, such as for want of a GPU or of a measured cost."""


def need_pandas() -> None:
    """Frames are the only use of pandas, which the extra `notebook` installs.

    Raises:
        RunError: it is not there.
    """
    if find_spec("pandas") is None:
        raise RunError("a frame needs pandas: pip install 'batchsim[notebook]'")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` most resembles, in any case and with `-` for `_`, or None.

    One that goes on where `word` ends, as `h100-sxm` does after `h100`, is meant. Where several are close, one with the
    same letters goes first: a swap of two letters is one slip, which a ratio of common letters counts as two.
    """
    word = word.lower().replace("-", "_")
    folded = {entry.lower().replace("-", "_"): entry for entry in known}
    longer = [entry for entry in folded if entry.startswith(f"{word}_")]
    matches = longer or sorted(get_close_matches(word, folded), key=lambda match: sorted(match) != sorted(word))
    return folded[matches[0]] if matches else None


def one_of(known: Sequence[str]) -> str:
    """`a`, or `a, b or c`."""
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"


def shown(value: object, limit: int = 60) -> str:
    """A value from a user's file as a message shows it: short, on one line, without control characters."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the string {_cut(repr(value), limit)}"
        case int() | float():
            return _cut(repr(value), limit)
        case dict():
            return "a mapping" if value else "an empty mapping"
        case list() | tuple():
            return "a list" if value else "an empty list"
        case _:
            return _cut(repr(value), limit)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
