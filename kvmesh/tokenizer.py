"""The models' tokenizers, loaded from where the engines have them."""

from __future__ import annotations

import asyncio
import copy
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmesh.aio import Tasks
from kvmesh.detokenize import Detokenizer
from kvmesh.errors import InvalidArgument, Unavailable

log = logging.getLogger(__name__)

# A longer text is tokenised in a thread; the event loop would feel it.
INLINE_CHARS = 2000
LOAD_S = 60.0
_IMPORTING = threading.Lock()
# How long a failure to load is believed.
RETRY_S = 30.0


class Tokenizer:
    """Text to tokens and back for one model. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._chat_tokenizer: Any = None
        self._chat_lock = threading.Lock()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = frozenset(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        self._fast: Any = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
            self._fast.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))

    async def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model's prompts begin with."""
        if len(text) <= INLINE_CHARS:
            return self._encode(text)
        return await asyncio.to_thread(self._encode, text)

    def _encode(self, text: str) -> list[int]:
        if self._fast is not None:
            return list(self._fast.encode(text).ids)
        return list(self._tokenizer.encode(text))

    async def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, by the model's chat template, up to where its answer begins.

        Raises InvalidArgument when there is no template, or it does not take the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise InvalidArgument("messages: the model has no chat template; use completions")
        try:
            return await asyncio.to_thread(self._chat, messages)
        except Exception as error:
            raise InvalidArgument(f"messages: the model's chat template does not take them: {error}") from None

    def _chat(self, messages: list[dict[str, Any]]) -> list[int]:
        with self._chat_lock:
            if self._chat_tokenizer is None:
                # One of its own: reading special tokens, which the template writes, is a state of the tokenizer.
                self._chat_tokenizer = copy.deepcopy(self._tokenizer)
            chat = self._chat_tokenizer
            text = chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return list(chat.encode(str(text), add_special_tokens=False, split_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids that are not special."""
        if self._fast is not None:
            return str(self._fast.decode(token_ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """A detokenizer for what follows `prompt`."""
        return Detokenizer(self.decode, self.special, prompt)


class Tokenizers:
    """One tokenizer for each model path, loaded once, in a thread."""

    def __init__(self) -> None:
        self._loading: dict[str, asyncio.Task[Tokenizer | None]] = {}
        self._failed: dict[str, float] = {}
        self._tasks = Tasks()

    def import_library(self) -> None:
        """Begins to import what takes seconds, before a model is known."""
        self._tasks.start(asyncio.to_thread(_library), "import the tokenizer library")

    def prepare(self, path: str) -> asyncio.Task[Tokenizer | None]:
        """Begins to load what is not loaded."""
        if path in self._failed and time.monotonic() - self._failed[path] >= RETRY_S:
            del self._failed[path], self._loading[path]
        if path not in self._loading:
            self._loading[path] = self._tasks.start(self._load(path), f"load the tokenizer of {path}")
        return self._loading[path]

    async def get(self, path: str) -> Tokenizer | None:
        """The tokenizer; None if there is none at `path`. Raises Unavailable when it takes too long to load."""
        task = self.prepare(path)
        if not task.done():
            try:
                async with asyncio.timeout(LOAD_S):
                    return await asyncio.shield(task)
            except TimeoutError:
                raise Unavailable(f"the tokenizer at {path} is not loaded after {LOAD_S:g} s") from None
        return task.result()

    async def _load(self, path: str) -> Tokenizer | None:
        if not path:
            log.info("the model has no folder: token prompts only")
            return None
        try:
            started = time.monotonic()
            tokenizer = await asyncio.to_thread(_load_from, path)
            log.info("tokenizer of %s loaded in %.1f s", path, time.monotonic() - started)
            return tokenizer
        except Exception as error:
            log.warning("no tokenizer at %s (%s: %s): token prompts only", path, type(error).__name__, error)
            self._failed[path] = time.monotonic()
            return None

    async def close(self) -> None:
        """Stops waiting for what still loads."""
        await self._tasks.close()


def without_torch() -> None:
    """For a process that computes nothing, before anything else: transformers then takes 70 MiB, and not 800.

    Nothing in the process can import torch afterwards.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # That there is none is no news.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _library() -> Any:
    # Its lazy modules do not stand being imported by two threads at once.
    with _IMPORTING:
        try:
            from transformers import AutoTokenizer
        except ModuleNotFoundError:
            log.info("transformers is not installed: token prompts only")
            return None
    return AutoTokenizer


def _load_from(path: str) -> Tokenizer:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"{path!r} is not a folder here")
    if (library := _library()) is None:
        raise ModuleNotFoundError("transformers is not installed")
    return Tokenizer(library.from_pretrained(path, local_files_only=True))
