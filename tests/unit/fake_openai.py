"""A small server with OpenAI's streaming completions, for tests: HTTP/1.1, chunked, and badly behaved on demand."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class FakeOpenAI:
    """`async with FakeOpenAI() as server`: answers with max_tokens words, `gap` seconds apart."""

    def __init__(self, gap: float = 0.002, fault: str = "") -> None:
        self.gap, self.fault = gap, fault
        self.bodies: list[dict[str, Any]] = []
        self.most = self.now = 0

    async def __aenter__(self) -> FakeOpenAI:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(h.split(b":")[1]) for h in head.split(b"\r\n") if h.lower().startswith(b"content-length"))
            body = json.loads(await reader.readexactly(length))
            self.bodies.append({**body, "path": head.split()[1].decode()})
            if self.fault == "refuse":
                text = b'{"error": {"message": "no room"}}'
                writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
            for i in range(body["max_tokens"]):
                if self.fault == "break" and i == 2:
                    return
                await asyncio.sleep(self.gap)
                self._event(writer, {"choices": [{"index": 0, "text": f"w{i} "}]})
                await writer.drain()
            usage = {
                "prompt_tokens": len(body["prompt"]),
                "completion_tokens": body["max_tokens"],
                "prompt_tokens_details": {"cached_tokens": 5},
            }
            self._event(writer, {"choices": [], "usage": usage})
            self._chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
        finally:
            self.now -= 1
            writer.close()

    def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        # In two chunks, so that a line may be cut anywhere.
        self._chunk(writer, data[:11])
        self._chunk(writer, data[11:])

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%s\r\n" % (len(data), data))
