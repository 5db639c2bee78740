"""JSON text of any size, scanned from a window a value at a time.

The standard library's scanner does the scanning, so strings, escapes and nesting are what it takes them for; what is
here decides how much text it is given. Memory is that of the window and of the largest single value asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any, NoReturn

from batchsim.errors import InputError

MAX_VALUE = 1 << 24  # Characters of one value; the largest events known, collectives of many ranks, have some 10,000.
MAX_DEPTH = 50  # Of values too large for the window.
LARGE = object()

_SPACE = re.compile(r"[ \t\n\r]*")
_DECIMAL_COMMA = re.compile(r"(?<=\d),\d", re.ASCII)
# What C prints for rates of what took no time, in traces of older profilers; and strings, which may hold such words.
_C_NUMBER = re.compile(r"-?(?:inf|nan)\b")
_STRING_OR_C_NUMBER = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|-?(?:inf|nan)\b', re.DOTALL)
# What text that ends in the middle may end with: all of these are errors until more comes.
_BEGUN = (
    "true", "false", "null", "NaN", "Infinity", "-Infinity", "inf", "-inf", "nan", "-nan", ".", "e+", "e-", "E+", "E-",
)  # fmt: skip
_ESCAPE = 12  # Characters of the longest escape, two surrogates.
_EXPONENT = 4  # Characters after a number that tell whether it goes on.


class TooLargeError(InputError):
    """A value of more characters than asked for."""


class JsonStream:
    """A reader of one JSON value that comes as pieces of text.

    Args:
        file: what refusals call the file.
        wanted: what they say should have been there, where the text is no JSON.
        whole: what they say should have been there, where the text ends too early.

    Every method raises InputError where the text does not hold what the method asks for.
    """

    def __init__(self, file: str, pieces: Iterator[str], *, wanted: str, whole: str) -> None:
        self._file = file
        self._pieces = pieces
        self._wanted = wanted
        self._whole = whole
        self._decode = _decode
        self._again = False
        self._text = ""
        self._at = 0
        self._dropped = 0  # Characters before the window.
        self._ended = False

    def peek(self) -> str:
        """The character that comes next, white space left out; empty at the end of the text."""
        while True:
            self._at = _after_space(self._text, self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def value(self, limit: int = MAX_VALUE) -> Any:
        """The value that comes next.

        Raises:
            TooLargeError: where it has more than `limit` characters; it is still the one that comes next.
        """
        while True:
            if not self.peek():
                self._refuse_end()
            size = len(self._text) - self._at
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._mended(error.pos):
                    continue
                if not self._may_go_on(error):
                    self._refuse_text(error.pos, error.msg)
                if size > limit:
                    self._refuse_size(limit)
                if self._ended:
                    self._refuse_end()
            except ValueError:
                self._refuse(f"a number of thousands of digits after {self._place(self._at)}")
            except RecursionError:
                self._refuse_depth()
            else:
                if end - self._at > limit:
                    self._refuse_size(limit)
                if self._ended or isinstance(value, dict | list | str) or len(self._text) - end >= _EXPONENT:
                    self._at = end
                    return value
            while len(self._text) - self._at < 2 * size and self._more():
                pass

    def members(self) -> Iterator[str]:
        """The keys of the object that comes next; after each the caller takes its value."""
        self._expect("{")
        if self.peek() == "}":
            self._at += 1
            return
        while True:
            if self.peek() not in ('"', ""):
                self._refuse_text(self._at)
            key: str = self.value()
            self._expect(":")
            yield key
            if self._closed("}"):
                return

    def elements(self, large: Callable[[], Any] | None = None) -> Iterator[list[Any]]:
        """The elements of the array that comes next, many at a time; none of the lists is empty.

        Args:
            large: takes an element that is not whole in the window; `value` where it is not given.
        """
        self._expect("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            self.peek()
            start = self._dropped + self._at
            yield self._many() or self._one_by_one() or [large() if large else self.value()]
            if self._again:
                self._again = False
                self._at = start - self._dropped
            elif self._closed("]"):
                self._decode = _decode
                return

    def exact(self) -> None:
        """In `elements`, give numbers with a point as Decimal, digit for digit, from the last elements once more."""
        self._decode = _decode_exactly
        self._again = True

    def skip(self, keep: int, depth: int = 0) -> Any:
        """Pass over the value that comes next and give it, or LARGE where it has more than `keep` characters."""
        try:
            return self.value(keep)
        except TooLargeError:
            if depth == MAX_DEPTH:
                self._refuse_depth()
        if self.peek() == "{":
            for _ in self.members():
                self.skip(keep, depth + 1)
        elif self.peek() == "[":
            for _ in self.elements(lambda: self.skip(keep, depth + 1)):
                pass
        else:
            self.value()
        return LARGE

    def end(self) -> None:
        """Refuse text that comes after the value."""
        if self.peek():
            self._refuse(f"{self._shown(self._at)} after the end of the trace, at {self._place(self._at)}")

    def _many(self) -> list[Any]:
        """What of the array lies in the window, up to a cut; nothing where that turns out to be a wrong place for one.

        A cut within a string or an element leaves something open, so that what scans as an array of elements is one.
        """
        cut = self._text.rfind("},", self._at) + 1
        if not cut:
            return []
        try:
            found, end = self._decode(f"[{self._text[self._at : cut]}]", 0)
        except (ValueError, RecursionError):
            return []
        if found:
            # The cut, or the array's own end where that comes before it.
            self._at += end - 2
        return found  # type: ignore[no-any-return]

    def _one_by_one(self) -> list[Any]:
        """The elements at the beginning of the window that are there with what separates them from the next."""
        found: list[Any] = []
        at = self._at
        while True:
            try:
                value, end = self._decode(self._text, at)
            except (ValueError, RecursionError):
                return found
            end = _after_space(self._text, end)
            if self._text[end : end + 1] not in (",", "]"):
                return found
            found.append(value)
            self._at = end
            if self._text[end] == "]":
                return found
            at = _after_space(self._text, end + 1)

    def _more(self) -> bool:
        piece = next(self._pieces, None)
        if piece is None:
            self._ended = True
            return False
        self._text = self._text[self._at :] + piece
        self._dropped += self._at
        self._at = 0
        return True

    def _mended(self, position: int) -> bool:
        """Whether an error was a number as C prints it; all of these in the window are NaN now."""
        if not _C_NUMBER.match(self._text, position):
            return False
        self._text = self._text[:position] + _STRING_OR_C_NUMBER.sub(_as_json, self._text[position:])
        return True

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Whether text to come may make this no error."""
        rest = self._text[error.pos : error.pos + _ESCAPE]
        return (
            error.msg.startswith("Unterminated string")
            or any(word.startswith(rest) for word in _BEGUN)
            or (error.msg.startswith("Invalid \\") and len(rest) < _ESCAPE)
        )

    def _expect(self, character: str) -> None:
        found = self.peek()
        if not found:
            self._refuse_end()
        if found != character:
            self._refuse_text(self._at)
        self._at += 1

    def _closed(self, closing: str) -> bool:
        """Whether a container ends here; otherwise its next part comes."""
        if closed := self.peek() == closing:
            self._at += 1
        else:
            self._expect(",")
        return closed

    def _place(self, position: int) -> str:
        return f"character {self._dropped + position + 1:,}"

    def _shown(self, position: int) -> str:
        return ascii(self._text[position : position + 40])

    def _refuse(self, found: str, wanted: str | None = None) -> NoReturn:
        raise InputError(self._file, "", found, wanted or self._wanted)

    def _refuse_end(self) -> NoReturn:
        found = f"a file that ends in the middle, after {self._dropped + len(self._text):,} characters"
        self._refuse(found, self._whole)

    def _refuse_text(self, position: int, error: str = "") -> NoReturn:
        if error.startswith("Expecting property name") and _DECIMAL_COMMA.match(self._text, position - 1):
            found = f"a decimal comma before {self._place(position)}"
            self._refuse(found, "points: record in a process whose locale (LC_NUMERIC) is C")
        self._refuse(f"{self._shown(position)} at {self._place(position)}, which is no JSON")

    def _refuse_size(self, limit: int) -> NoReturn:
        found = f"a value of more than {limit:,} characters at {self._place(self._at)}"
        raise TooLargeError(self._file, "", found, self._wanted)

    def _refuse_depth(self) -> NoReturn:
        self._refuse(f"brackets nested too deeply after {self._place(self._at)}")


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _as_json(match: re.Match[str]) -> str:
    return match[0] if match[0].startswith('"') else "NaN".rjust(len(match[0]))


def _decimal(text: str) -> Decimal | float:
    # Exponents would let a few characters stand for an integer that fills the memory.
    return float(text) if len(text) > 40 or "e" in text or "E" in text else Decimal(text)


_decode: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
_decode_exactly: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder(parse_float=_decimal).raw_decode
