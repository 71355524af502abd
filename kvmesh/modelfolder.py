"""What a model's folder, in Hugging Face's form, says: which model it is, and how its KV lies."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvmesh.dataplane.layout import ITEM_BYTES, Layout
from kvmesh.errors import InvalidArgument


def read_config(folder: Path) -> dict[str, Any]:
    """Its config.json. Raises InvalidArgument when `folder` is no model."""
    config = folder / "config.json"
    if not config.is_file():
        raise InvalidArgument(f"model = {str(folder)!r} has no config.json: give the folder of a Hugging Face model")
    try:
        content = json.loads(config.read_text())
    except ValueError as error:
        raise InvalidArgument(f"{config} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidArgument(f"{config} is not a JSON object")
    return content


def model_digest(folder: Path) -> str:
    """32 hexadecimal digits that tell models apart: over the configuration, and names and sizes of the weights.

    Raises InvalidArgument when `folder` is no model.
    """
    digest = blake2b(json.dumps(read_config(folder), sort_keys=True).encode(), digest_size=16)
    for path in sorted(folder.glob("*.safetensors*")):
        digest.update(f"{path.name}:{path.stat().st_size};".encode())
        # Sizes are equal for models of one architecture: the first tensors' bytes are not.
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def layout_of(folder: Path, dtype: str, page_size: int) -> Layout:
    """The layout that an engine with one rank gives the model's KV. `dtype` auto: what the configuration says.

    Raises InvalidArgument when `folder` is no model, or it does not say.
    """
    config = read_config(folder)
    if dtype == "auto":
        dtype = str(config.get("dtype") or config.get("torch_dtype"))
        if dtype not in ITEM_BYTES:
            raise InvalidArgument(f"dtype = 'auto', but {folder / 'config.json'} says {dtype}: give one")
    try:
        heads = int(config["num_attention_heads"])
        dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
        kv_heads = int(config.get("num_key_value_heads") or heads)
        layers = int(config["num_hidden_layers"])
    except KeyError as error:
        raise InvalidArgument(
            f"{folder / 'config.json'} has no {error.args[0]}: its KV is not plain attention's"
        ) from None
    return Layout(model_digest(folder), dtype, layers, kv_heads, dim, dim, page_size)
