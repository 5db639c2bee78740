"""Work for the host, in fixed amounts: Python and numpy, as loops around a model do. Never a sleep."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from calibration.pairs.lab import Array

PIECES = tuple(chr(97 + i % 26) + chr(97 + i // 26 % 26) + " " * (i % 3 == 0) for i in range(1024))
MEANS, DEVIATIONS = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=np.float32)
_RANKS = {piece: rank for rank, piece in enumerate(PIECES)}
_WORDS = " ".join(PIECES[i * i % 1024] + PIECES[i * 7 % 1024] for i in range(4096)).split()


def turns(count: int, value: int = 1) -> int:
    """`count` turns of a small loop in the interpreter; the result depends on all of them."""
    for _ in range(count):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return value


def tokenise(step: int, out: Array) -> None:
    """Fill `out` (texts, tokens) with token ids: words cut into pieces of two letters and looked up, one by one."""
    texts, length = out.shape
    for row in range(texts):
        at = (step * 131 + row * 17) % 3500
        ids: list[int] = []
        for word in _WORDS[at : at + length]:
            for i in range(0, len(word), 2):
                ids.append(_RANKS.get(word[i : i + 2], 3))  # noqa: PERF401 - as tokenisers do
        out[row] = ids[:length]


@dataclass(slots=True)
class Request:
    """A request as a serving loop keeps it: its tokens, its blocks of cache, its text so far."""

    index: int
    last: int = 1
    length: int = 1
    blocks: list[int] = field(default_factory=list)
    text: str = ""
    seen: dict[int, int] = field(default_factory=dict)

    def take(self, token: int, care: int) -> int:
        """Take a token; `care` sets how much work that is (a turn is about a tenth of a microsecond)."""
        self.last = token
        if self.length % 16 == 1:
            self.blocks = [*self.blocks[-31:], (self.index * 977 + self.length) & 0xFFFF]
        self.seen[token & 255] = self.seen.get(token & 255, 0) + 1
        self.text = self.text[-200:] + PIECES[token & 1023]
        return turns(care, token)


def normalised(pixels: Array, out: Array) -> None:
    """Images of bytes (count, height, width, channels) as numbers around zero, into `out` of the same shape."""
    np.multiply(pixels, np.float32(1 / 255), out=out)
    np.subtract(out, MEANS, out=out)
    np.divide(out, DEVIATIONS, out=out)
