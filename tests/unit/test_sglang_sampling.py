"""Sampling on the CPU: what is cut, what is drawn, and that a seed draws the same again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_parts import sampling


@pytest.fixture(autouse=True)
def replaced(monkeypatch):
    """The stock one is a Triton kernel; in a scheduler a hook puts ours in its place."""
    import sglang.srt.layers.sampler as stock

    monkeypatch.setattr(stock, "multinomial_with_seed", sampling._choose)


PROBS = torch.tensor([0.4, 0.05, 0.25, 0.2, 0.1])


def draw(
    count: int = 2000, top_k: int = 2**30, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = 1
) -> torch.Tensor:
    """How often each of PROBS is drawn."""
    rows = PROBS.expand(count, -1).clone()
    chosen = sampling._sample(
        rows,
        torch.full((count,), top_k),
        torch.full((count,), top_p),
        torch.full((count,), min_p),
        min_p > 0,
        None if seed is None else torch.full((count,), seed),
        torch.arange(count),
    )
    assert chosen.dtype == torch.int32 and chosen.shape == (count,)
    return torch.bincount(chosen.to(torch.int64), minlength=5) / count


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, None])
def test_draws_follow_the_probabilities(seed):
    torch.manual_seed(1)
    assert torch.allclose(draw(seed=seed), PROBS, atol=0.04)


@pytest.mark.parametrize(
    ("cut", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_p": 0.1}, [0]),
        ({"top_p": 0.45}, [0, 2]),
        ({"top_p": 0.7}, [0, 2, 3]),
        ({"min_p": 0.5}, [0, 2, 3]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 4, "top_p": 0.9, "min_p": 0.3}, [0, 2, 3]),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [3, None])
def test_what_is_cut_is_never_drawn(cut, kept, seed):
    torch.manual_seed(1)
    wanted = torch.zeros(5)
    wanted[kept] = PROBS[kept] / PROBS[kept].sum()
    assert torch.allclose(draw(**cut, seed=seed), wanted, atol=0.05)
    assert set(torch.nonzero(draw(**cut, seed=seed)).view(-1).tolist()) == set(kept)


def choose(seed: int, position: int, row: torch.Tensor) -> int:
    return int(sampling._choose(row.log().view(1, -1), torch.tensor([seed]), torch.tensor([position])))


def test_a_seed_and_a_position_draw_the_same_always():
    row = torch.full((1000,), 0.001)
    first = [choose(7, at, row) for at in range(50)]
    assert first == [choose(7, at, row) for at in range(50)]
    assert len(set(first)) > 40
    assert first != [choose(8, at, row) for at in range(50)]
    # Numbers that share their lower halves are different all the same.
    assert choose(7, 3, row) != choose(7, 3 + 2**16, row)
    pairs = {(s, p): choose(s, p, row) for s in (0, 1, 2**31 - 1) for p in (0, 1, 2, 131072)}
    assert len(set(pairs.values())) >= 11


def test_others_in_the_batch_make_no_difference():
    """Neither their number, nor what is cut of them."""
    generator = torch.Generator().manual_seed(3)
    probs = torch.softmax(torch.randn(6, 50, generator=generator), dim=-1)
    seeds, positions = torch.arange(6), torch.arange(6) * 10
    off = torch.full((6,), 2**30), torch.ones(6), torch.zeros(6)
    together = sampling._sample(probs, *off, False, seeds, positions)
    with_cut = sampling._sample(probs, torch.tensor([2**30, 1, 2, 3, 4, 5]), *off[1:], False, seeds, positions)
    with_min_p = sampling._sample(probs, *off[:2], torch.tensor([0, 0.5, 0.5, 0.5, 0.5, 0.5]), True, seeds, positions)
    alone = sampling._sample(probs[:1], *(o[:1] for o in off), False, seeds[:1], positions[:1])
    assert together[0] == alone[0] == with_cut[0] == with_min_p[0]
    assert with_cut[1] == probs[1].argmax()


def test_the_best_is_always_kept():
    """Also where rounding leaves nothing else."""
    row = torch.zeros(1, 5)
    row[0, 3] = 1.0
    one = torch.ones(1)
    for top_p in (1e-6, 0.5, 1.0):
        chosen = sampling._sample(row, one.long(), one * top_p, one, True, one.long(), one.long())
        assert chosen.tolist() == [3]


# Stop tokens with ignore_eos


@pytest.mark.parametrize(("ignore", "stops"), [(True, {5}), (True, set()), (False, {5}), (False, set())])
@pytest.mark.parametrize("fails", [False, True])
def test_stop_tokens_count_also_when_the_end_of_sequence_does_not(ignore, stops, fails):
    params = SimpleNamespace(ignore_eos=ignore, stop_token_ids=stops)
    req = SimpleNamespace(sampling_params=params, eos_token_ids={9})
    seen = []

    def original(req, tokens):
        seen.append((params.ignore_eos, req.eos_token_ids, tokens))
        if fails:
            raise RuntimeError
        return "answer"

    if fails:
        with pytest.raises(RuntimeError):
            sampling._ended(original, req, [5])
    else:
        assert sampling._ended(original, req, [5]) == "answer"
    looked = (False, None, [5]) if ignore and stops else (ignore, {9}, [5])
    assert seen == [looked]
    assert (params.ignore_eos, req.eos_token_ids) == (ignore, {9})


# Log-probabilities before penalties


@pytest.mark.parametrize("penalties", [True, False, None])
@pytest.mark.parametrize("wanted", [True, False])
def test_log_probabilities_are_of_the_model(penalties, wanted):
    logits = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    output = SimpleNamespace(next_token_logits=logits.clone(), next_token_logprobs="stock")
    orchestrator = None if penalties is None else SimpleNamespace(is_required=penalties)
    info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    batch = SimpleNamespace(return_logprob=wanted, sampling_info=info)

    def original(runner, output, batch):
        output.next_token_logits -= torch.tensor([[0.0, 0.0, 10.0], [10.0, 0.0, 0.0]])
        return output.next_token_logits.argmax(dim=-1).to(torch.int32)

    chosen = sampling._with_logprobs(original, None, output, batch)
    assert chosen.tolist() == [1, 1]
    if penalties and wanted:
        expected = torch.log_softmax(logits, dim=-1)[:, 1]
        assert torch.allclose(output.next_token_logprobs, expected)
    else:
        assert output.next_token_logprobs == "stock"


@pytest.mark.parametrize("backend", ["pytorch", "flashinfer"])
def test_every_request_has_its_seed(monkeypatch, backend):
    import sglang.srt.runtime_context as context

    monkeypatch.setattr(context, "get_exec", lambda: SimpleNamespace(kernel=SimpleNamespace(sampling_backend=backend)))
    reqs = [SimpleNamespace(sampling_params=SimpleNamespace(sampling_seed=s)) for s in (5, None, 0)]
    info = SimpleNamespace(sampling_seed="stock")
    assert sampling._seed(info, None, SimpleNamespace(reqs=reqs, device="cpu")) is info
    assert info.sampling_seed == "stock" if backend != "pytorch" else info.sampling_seed.tolist() == [5, 0, 0]
