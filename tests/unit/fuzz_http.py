"""Random and mutated HTTP requests, by an OpenAPI description alone."""

from __future__ import annotations

import json
import random
from typing import Any

NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.5, 31, 32, 33, 1e9, 2**31, 2**32, 2**63, 2**64, -(2**63), 1e308, 1e-300)
TEXTS = (
    "",
    " ",
    "a",
    "x" * 500,
    "\0",
    "é☃𝄞",
    "none",
    "null",
    "-1",
    "{}",
    "[1]",
    "data_parallel",
    "../..",
    "%00",
    "\ud800",
)
TEMPLATES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "", "prompt": [72, 101, 108, 108, 111], "max_tokens": 3, "temperature": 0, "n": 1},
    "/v1/chat/completions": {"model": "", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3},
    "/v1/microserving/{engine}/prep_recv": {"token_ids": [1, 2, 3, 4], "end": -1, "ttl_ms": 500},
    "/v1/microserving/{engine}/remote_send": {"token_ids": [1, 2, 3, 4], "begin": 0, "end": -1},
    "/v1/microserving/{engine}/start_generate": {
        "token_ids": [1, 2, 3, 4],
        "begin": 0,
        "sampling": {"max_new_tokens": 2},
    },
    "/v1/microserving/{engine}/release": {"ticket": {"id": "1"}},
}
EXTRA = {
    "response_format": ({"type": "json_object"}, {"type": "json_schema", "json_schema": {}}, {"type": "text"}, 7),
    "regex": ("(", "a+", 5),
    "json_schema": ("{", "{}", '{"type": "object"}', {"type": 7}),
    "stop": (["a"] * 20, "", ["", "x"], [1]),
    "stream": (True, False, "yes"),
    "stream_options": ({"include_usage": True}, {"include_usage": []}, 5),
    "logprobs": (True, 1, 5, -1),
    "strategy": ("prefill_decode", "none", "store_backed"),
    "strategy_params": ({"min_remote": 1}, {"x": {}}, {"ratio": "nan"}),
    "priority": ("high", "x", 3),
    "tools": ([{"type": "function"}],),
}


class HttpMaker:
    """Makes requests to the operations of `description` (an OpenAPI document)."""

    def __init__(self, rng: random.Random, description: dict[str, Any], engines: list[str]) -> None:
        self.rng = rng
        self._schemas = description.get("components", {}).get("schemas", {})
        self._engines = engines
        self.operations = [
            (path, verb, op) for path, verbs in description["paths"].items() for verb, op in verbs.items()
        ]

    def request(self, path: str, verb: str, operation: dict[str, Any]) -> dict[str, Any]:
        """Arguments of httpx's `request`."""
        rng = self.rng
        made: dict[str, Any] = {"method": verb.upper(), "params": {}, "headers": {}}
        where = path
        for parameter in operation.get("parameters", []):
            name, place = parameter["name"], parameter["in"]
            value = self.value(parameter.get("schema", {}), 0)
            if place == "path":
                known = rng.choice(self._engines) if rng.random() < 0.8 else str(value)
                where = where.replace(f"{{{name}}}", _quoted(known) or "x")
            elif rng.random() < 0.5:
                text = json.dumps(value) if isinstance(value, dict | list) else str(value)
                if place == "query":
                    made["params"][name] = text.encode("utf-8", "replace").decode()
                else:
                    made["headers"][name] = "".join(c for c in text if 32 < ord(c) < 127)[:200]
        made["url"] = where
        if "requestBody" in operation:
            made["headers"]["content-type"] = rng.choice(("application/json",) * 9 + ("text/plain",))
            made["content"] = self._body(path, operation)
        return made

    def _body(self, path: str, operation: dict[str, Any]) -> bytes:
        rng = self.rng
        template = TEMPLATES.get(path)
        if template is not None and rng.random() < 0.75:
            body = dict(template)
            for _ in range(rng.choice((0, 1, 1, 2))):
                self._mutate(body, operation)
        else:
            body = self.value(operation["requestBody"]["content"]["application/json"]["schema"], 0)
        content = json.dumps(body).encode()
        kind = rng.random()
        if kind < 0.03:
            return rng.randbytes(rng.randint(0, 100))
        if kind < 0.06:
            return content[: rng.randint(0, len(content))]
        return b"[" * 2000 if kind < 0.065 else content

    def _mutate(self, body: dict[str, Any], operation: dict[str, Any]) -> None:
        rng = self.rng
        schema = self._resolved(operation["requestBody"]["content"]["application/json"]["schema"])
        properties = schema.get("properties") or {name: {} for name in (*body, "token_ids")}
        kind = rng.random()
        if kind < 0.15 and body:
            del body[rng.choice(list(body))]
        elif kind < 0.45:
            name = rng.choice(list(EXTRA))
            body[name] = rng.choice(EXTRA[name])
        else:
            name = rng.choice(list(properties))
            body[name] = self.value(properties[name], 0)

    def _resolved(self, schema: Any) -> dict[str, Any]:
        while isinstance(schema, dict) and "$ref" in schema:
            schema = self._schemas[schema["$ref"].rpartition("/")[2]]
        return schema if isinstance(schema, dict) else {}

    def value(self, schema: Any, depth: int) -> Any:
        """Mostly of the schema's type; now and then of any."""
        rng, schema = self.rng, self._resolved(schema)
        if rng.random() < 0.12 or depth > 4:
            return rng.choice((None, True, [], {}, [[]], {"a": {"b": []}}, *NUMBERS, *TEXTS))
        if choices := schema.get("anyOf") or schema.get("oneOf"):
            return self.value(rng.choice(choices), depth + 1)
        match schema.get("type"):
            case "object":
                named = schema.get("properties", {})
                made = {k: self.value(v, depth + 1) for k, v in named.items() if rng.random() < 0.5}
                return made or {rng.choice(TEXTS): rng.choice(NUMBERS)}
            case "array":
                return [self.value(schema.get("items", {}), depth + 1) for _ in range(rng.choice((0, 1, 3, 40)))]
            case "integer":
                return rng.choice([n for n in NUMBERS if isinstance(n, int)])
            case "number":
                return rng.choice(NUMBERS)
            case "boolean":
                return rng.random() < 0.5
            case "string":
                return rng.choice(schema.get("enum", TEXTS))
        return rng.choice((None, *NUMBERS, *TEXTS))


def _quoted(text: str) -> str:
    from urllib.parse import quote

    return quote(text.encode("utf-8", "replace"), safe="")
