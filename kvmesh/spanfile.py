"""Spans in a local file, one OpenTelemetry JSON object a line, that never grows beyond a few files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = logging.getLogger(__name__)

# Bytes of a file, and how many of them are kept: NAME.jsonl, NAME.jsonl.1, …
FILE_BYTES, FILES = 16 << 20, 4


class SpanFile(SpanExporter):
    """Appends to `path`, made with its folder at the first span; what cannot be written is lost, and logged once."""

    def __init__(self, path: Path, file_bytes: int = FILE_BYTES, files: int = FILES) -> None:
        self.path = path
        self._file_bytes, self._files = file_bytes, files
        self._file: BinaryIO | None = None
        self._failed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Writes `spans` and flushes."""
        # Indentation of 0 and None are one line each, but only None has no newline in it.
        data = "".join(f"{span.to_json(indent=None)}\n" for span in spans).encode()
        try:
            file = self._open()
            if file.tell() and file.tell() + len(data) > self._file_bytes:
                file = self._rotate()
            file.write(data)
            file.flush()
        except OSError as error:
            if not self._failed:
                log.warning("spans are not written to %s: %s", self.path, error.strerror)
            self._failed = True
            self.shutdown()
            return SpanExportResult.FAILURE
        self._failed = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the file; a later export opens it again."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is held back."""
        return True

    def _open(self) -> BinaryIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115
        return self._file

    def _rotate(self) -> BinaryIO:
        self.shutdown()
        for number in reversed(range(1, self._files)):
            older = self._numbered(number - 1)
            if older.exists():
                os.replace(older, self._numbered(number))
        return self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path
