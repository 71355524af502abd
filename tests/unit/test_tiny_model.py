"""The tiny model: its files, its tokenizer, and that its greedy choices are worth comparing."""

import hashlib
import os
import random
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmesh.local import tiny_model as module
from kvmesh.local.tiny_model import PRINTABLE, Recipe, tiny_model

SMALL = Recipe(layers=1, hidden=16, heads=1, kv_heads=1, head_dim=16, intermediate=16)
TEXTS = [
    "",
    "hello",
    "  two  spaces, a tab\tand lines\r\n\n",
    "don't . , ? !",
    "ü € 😀 日本語 \u0301",
    "\x00\x07\x7f\ufffd",
    "<s>",
    "end</s><pad> <unused0>",
]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The default model, made once for this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMESH_HOME", str(tmp_path_factory.mktemp("home")))
        return tiny_model()


@pytest.fixture(scope="module")
def tokenizer(model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def llama(model):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(model)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_it_is_made_once(home):
    first = tiny_model(SMALL)
    assert first.is_absolute() and first.parent == home / "models" and first.name == f"tiny-{SMALL.digest()}"
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(os.listdir(first))
    before = {p: p.stat().st_mtime_ns for p in first.iterdir()}
    assert tiny_model(SMALL) == first
    assert {p: p.stat().st_mtime_ns for p in first.iterdir()} == before
    assert os.listdir(first.parent) == [first.name]


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_does_not(home, monkeypatch, tmp_path):
    first = tiny_model(SMALL)
    monkeypatch.setenv("KVMESH_HOME", str(tmp_path / "other"))
    again = tiny_model(SMALL)
    assert again != first and digests(again) == digests(first)
    other = tiny_model(Recipe(**{**vars(SMALL), "seed": 2}))
    assert other.parent == again.parent and other.name != again.name
    changed = {n for n, d in digests(other).items() if d != digests(first)[n]}
    assert changed == {"model.safetensors"}


def test_makers_at_the_same_time_leave_one_whole_model(home):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: tiny_model(SMALL), range(8)))
    (folder,) = folders
    assert os.listdir(folder.parent) == [folder.name]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(home, monkeypatch, error):
    (home / "models" / "mine").mkdir(parents=True)

    def write(recipe, folder):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(type(error)):
        tiny_model(SMALL)
    assert os.listdir(home / "models") == ["mine"]


def test_up_needs_no_torch_to_find_a_model_that_exists(home):
    made = tiny_model()
    code = (
        "import sys\nfrom kvmesh.local.mesh import resolve_model\nprint(*resolve_model(''))\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'sglang', 'grpc'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [f"{made} True", "[]"], done.stderr


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_names_of_special_tokens_in_text_are_text(tokenizer):
    for name in ("<s>", "</s>", "<pad>", "<unused7>"):
        assert tokenizer.encode(f"a{name}b") == list(f"a{name}b".encode())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 257, 258)
    assert tokenizer.decode([256, 65, 257, 300], skip_special_tokens=True) == "A"


def test_every_id_of_the_vocabulary_has_a_token(tokenizer, llama):
    vocab = llama.config.vocab_size
    assert len(tokenizer) == vocab == Recipe().vocab
    tokens = tokenizer.convert_ids_to_tokens(list(range(vocab)))
    assert None not in tokens and len(set(tokens)) == vocab
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(vocab))
    assert all(tokenizer.decode([i]) == chr(i) for i in PRINTABLE)


def greedy(llama, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Tokens, and how far the best logit was above the second."""
    import torch

    ids = torch.tensor([prompt])
    out = llama.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [logits[0].topk(2).values for logits in out.logits]
    return out.sequences[0, len(prompt) :].tolist(), [float(b[0] - b[1]) for b in best]


def test_greedy_choices_are_printable_far_apart_and_depend_on_the_whole_prompt(llama):
    draw = random.Random(3)
    gaps: list[float] = []
    chosen: set[int] = set()
    for length in (1, 2, 17, 60, 200, 700, 1500):
        prompt = [draw.choice(PRINTABLE) for _ in range(length)]
        tokens, apart = greedy(llama, prompt, 24)
        chosen.update(tokens)
        gaps += apart
        if length > 1:
            # What differs is far away from the end of the prompt, but for the shortest.
            other = [draw.choice(PRINTABLE) for _ in range(length // 2)] + prompt[length // 2 :]
            assert greedy(llama, other, 24)[0] != tokens
    assert chosen <= set(PRINTABLE) and len(chosen) > 20
    # Of 168 choices: none is a tie for float32, few are for bfloat16, and most are clear.
    assert min(gaps) > 1e-3 and statistics.quantiles(gaps, n=20)[0] > 0.03 and statistics.median(gaps) > 0.5
