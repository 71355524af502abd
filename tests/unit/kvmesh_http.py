"""An HTTP door over fake engines."""

from __future__ import annotations

import httpx
import openai
from router_harness import Harness

TEXT = "Once upon a time"


class Http:
    """A mesh of fake engines with an HTTP door at `base`."""

    def __init__(self, mesh: Harness, base: str) -> None:
        self.mesh = mesh
        self.base = base
        self.openai = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=10)
        self.http = httpx.AsyncClient(base_url=base, timeout=10)
