"""Stop strings in a stream of text."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of `stops` is complete, wherever the pieces are cut.

    Text that may be the beginning of a stop string is held back. The stop string that is complete
    first wins, the longest of those that are complete at the same character.

    Attributes:
      matched: the stop string that was found; nothing passes after it.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self.matched: str | None = None
        self._patterns = [_Pattern(stop) for stop in sorted(stops, key=len, reverse=True)]
        self._include_stop = include_stop
        self._held = ""

    def push(self, text: str) -> str:
        """Text that is now known to come before any stop string."""
        if not self._patterns:
            return text
        if self.matched is not None:
            return ""
        begin = len(self._held)
        buffer = self._held + text
        for end, char in enumerate(text, start=begin + 1):
            for pattern in self._patterns:
                if pattern.advance(char):
                    self.matched = pattern.text
                    self._held = ""
                    return buffer[: end if self._include_stop else end - len(pattern.text)]
        certain = len(buffer) - max(pattern.num_matched for pattern in self._patterns)
        self._held = buffer[certain:]
        return buffer[:certain]

    def finish(self) -> str:
        """What was held back, when no text follows."""
        held, self._held = self._held, ""
        return held


class _Pattern:
    """Knuth, Morris and Pratt's automaton: `num_matched` is the length of the longest beginning of
    `text` that the characters so far end with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._fallback = [0] * (len(text) + 1)  # matched length → the next shorter candidate
        length = 0
        for i, char in enumerate(text[1:], start=2):
            while length and text[length] != char:
                length = self._fallback[length]
            length += text[length] == char
            self._fallback[i] = length

    def advance(self, char: str) -> bool:
        """Whether `char` completes the pattern."""
        while self.num_matched and self.text[self.num_matched] != char:
            self.num_matched = self._fallback[self.num_matched]
        self.num_matched += self.text[self.num_matched] == char
        return self.num_matched == len(self.text)
