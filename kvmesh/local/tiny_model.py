"""A tiny random Llama with a byte-level tokenizer, for a mesh without a model of one's own.

Written without torch, from one numpy generator, so that the same recipe gives the same bytes everywhere. Embeddings and
output rows are wide compared with the rest, which keeps the two best logits apart, so that greedy choices are stable.
One residual dimension is held constant and read only by the output rows: it makes printable characters win.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kvmesh.config import home

SPECIAL = ("<s>", "</s>", "<pad>")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
PRINTABLE = (10, *range(32, 127))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that the files depend on; its digest names the folder."""

    seed: int = 20261121
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    intermediate: int = 256
    vocab: int = 320
    context: int = 4096
    embedding_std: float = 1.0
    output_std: float = 0.3
    weight_std: float = 0.12
    # The constant dimension: its size in every embedding, and what output rows make of it (about as many logits).
    constant: float = 5.0
    lift: float = 12.0
    # Raised when the code below changes what it writes.
    version: int = 2

    def digest(self) -> str:
        """12 hexadecimal digits."""
        fields = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return blake2b(fields.encode(), digest_size=6).hexdigest()


def tiny_model(recipe: Recipe | None = None) -> Path:
    """The model's folder, `home()/models/tiny-<digest>`, made on first use. Several makers at once are fine."""
    recipe = recipe or Recipe()
    target = home().absolute() / "models" / f"tiny-{recipe.digest()}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkdtemp gives an absolute path to a folder that only we know, which is all that is ever removed here.
    made = tempfile.mkdtemp(prefix=".tiny-", dir=target.parent)
    try:
        _write(recipe, Path(made))
        os.chmod(made, 0o755)
        os.rename(made, target)
    except OSError:
        shutil.rmtree(made, ignore_errors=True)
        # Another maker was first: a folder that is not empty cannot be renamed over.
        if not target.exists():
            raise
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return target


def _write(recipe: Recipe, folder: Path) -> None:
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    _tokenizer(recipe).save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=recipe.vocab,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        dtype="float32",
    )
    config.save_pretrained(folder)
    save_file(dict(_weights(recipe)), folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(recipe: Recipe) -> Any:
    """Ids 0 to 255 are the bytes; no token is added on either side; special tokens are never read from text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    unused = [f"<unused{i}>" for i in range(recipe.vocab - 256 - len(SPECIAL))]
    names = [_byte_symbol(b) for b in range(256)] + [*SPECIAL, *unused]
    core = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in [*SPECIAL, *unused]])
    bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
        split_special_tokens=True,
        model_max_length=recipe.context,
    )


def _byte_symbol(byte: int) -> str:
    """The character that byte-level BPE writes for `byte` (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in plain else chr(256 + sum(1 for b in range(byte) if b not in plain))


def _weights(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    import numpy as np

    draw = np.random.default_rng(recipe.seed)

    def normal(rows: int, columns: int, std: float = recipe.weight_std) -> Any:
        return (draw.standard_normal((rows, columns)) * std).astype(np.float32)

    def reader(rows: int) -> Any:
        matrix = normal(rows, recipe.hidden)
        matrix[:, 0] = 0
        return matrix

    def writer(columns: int) -> Any:
        matrix = normal(recipe.hidden, columns)
        matrix[0] = 0
        return matrix

    ones = np.ones(recipe.hidden, np.float32)
    embedding = normal(recipe.vocab, recipe.hidden, recipe.embedding_std)
    embedding[:, 0] = recipe.constant
    yield "model.embed_tokens.weight", embedding
    for i in range(recipe.layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", ones.copy()
        yield f"{layer}.self_attn.q_proj.weight", reader(recipe.heads * recipe.head_dim)
        yield f"{layer}.self_attn.k_proj.weight", reader(recipe.kv_heads * recipe.head_dim)
        yield f"{layer}.self_attn.v_proj.weight", reader(recipe.kv_heads * recipe.head_dim)
        yield f"{layer}.self_attn.o_proj.weight", writer(recipe.heads * recipe.head_dim)
        yield f"{layer}.post_attention_layernorm.weight", ones.copy()
        yield f"{layer}.mlp.gate_proj.weight", reader(recipe.intermediate)
        yield f"{layer}.mlp.up_proj.weight", reader(recipe.intermediate)
        yield f"{layer}.mlp.down_proj.weight", writer(recipe.intermediate)
    yield "model.norm.weight", ones.copy()
    output = normal(recipe.vocab, recipe.hidden, recipe.output_std)
    output[:, 0] = -recipe.lift
    output[list(PRINTABLE), 0] = recipe.lift
    yield "lm_head.weight", output
