"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

# The window of tokens decoded anew for each one: enough context for any decoder, cut back when it has grown.
WINDOW, CONTEXT = 24, 8
# What a decoder shows for bytes that are no character, or not yet; the beginning of one is at most 3 bytes.
UNFINISHED, HELD = "\ufffd", 3


class Detokenizer:
    """Text of a growing token sequence, given out piece by piece; the pieces joined are `decode` of all tokens.

    `decode` maps ids to text. `special` ids have no text. `context` are the tokens before the first, whose text is not
    given out but may shape what follows (a leading space).
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], special: Collection[int], context: Sequence[int] = ()
    ) -> None:
        self._decode = decode
        self._special = special
        self._ids = [t for t in context[-2 * CONTEXT :] if t not in special]
        # The text of the window that has been given out, and how many tokens came since it was.
        self._shown = decode(self._ids) if self._ids else ""
        self._pending = 0
        if self._shown.endswith(UNFINISHED):
            self._ids, self._shown = [], ""
        self._cut_back(self._shown)

    def add(self, token: int) -> str:
        """The characters that are whole now that `token` has come."""
        if token in self._special:
            return ""
        self._ids.append(token)
        self._pending += 1
        text = self._decode(self._ids)
        held = len(text) - len(text.rstrip(UNFINISHED))
        if held and self._pending <= HELD:
            # A decoder with byte fallback shows nothing right next to the beginning of a character: wait for its end.
            return ""
        text = self._agreed(text)
        whole = max(len(self._shown), len(text) - min(held, HELD))
        piece = text[len(self._shown) : whole]
        self._shown = text[:whole]
        self._pending = HELD if held else 0
        if len(self._ids) > WINDOW:
            self._cut_back(text)
        return piece

    def finish(self) -> str:
        """What was held back; no character is completed any more."""
        if not self._pending:
            return ""
        text = self._agreed(self._decode(self._ids))
        piece, self._shown, self._pending = text[len(self._shown) :], text, 0
        return piece

    def _agreed(self, text: str) -> str:
        """`text`, or, when bytes that are no character made the decoder take back what was shown, that of the rest."""
        if text.startswith(self._shown):
            return text
        self._ids, self._shown = self._ids[-self._pending :], ""
        return self._decode(self._ids)

    def _cut_back(self, text: str) -> None:
        """Shortens the window to its last CONTEXT tokens, or a few more so as not to cut a character."""
        held = len(text) - len(self._shown)
        for count in range(CONTEXT, CONTEXT + HELD + 1):
            tail = self._decode(self._ids[-count:])
            if len(tail) >= held and text.endswith(tail):
                self._ids, self._shown = self._ids[-count:], tail[: len(tail) - held]
                return
        if len(self._ids) > 4 * WINDOW:
            # A decoder for which no end of the window stands for itself: better no context than ever more of it.
            self._ids, self._shown = self._ids[len(self._ids) - self._pending :], ""


class StopStrings:
    """Text up to the first of `stops`; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """(text to show, the stop string found). Of several matches the one that is complete first counts."""
        if not self._stops:
            return piece, None
        text = self._held + piece
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, stop = min(found)
            self._held = ""
            return text[:at], stop
        keep = max(self._overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of `text` that `stop` begins with."""
        return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)

    def finish(self) -> str:
        """What was held back; no stop string is completed any more."""
        held, self._held = self._held, ""
        return held


class TextStream:
    """Detokenizer and stop strings in a row. Without a detokenizer the text is empty."""

    def __init__(self, detokenizer: Detokenizer | None, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)

    def add(self, token: int) -> tuple[str, str | None]:
        """(text to show, the stop string that ends the answer with this token)."""
        return ("", None) if self._detokenizer is None else self._stops.add(self._detokenizer.add(token))

    def finish(self) -> tuple[str, str | None]:
        """The rest of the text, and a stop string found in it."""
        if self._detokenizer is None:
            return "", None
        text, stop = self._stops.add(self._detokenizer.finish())
        return (text, stop) if stop is not None else (text + self._stops.finish(), None)
