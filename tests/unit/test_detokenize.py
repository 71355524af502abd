"""Incremental text: whole characters only, nothing of a stop string, and in sum exactly the text of all tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvmesh.detokenize import CONTEXT, WINDOW, Detokenizer, StopStrings, TextStream

TEXT = (
    "Fünf große Boxkämpfer jagen Victor quer über den Deich. 日本語のテキスト、漢字とかな。 "
    "Emoji: 🥊👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪🇯🇵. Ελληνικά, русский, עברית, العربية. \n\ttabs  and   spaces… "
)
EOS = 500


def by_bytes(ids: Sequence[int]) -> str:
    """The decoder of a byte-level tokenizer without merges."""
    return bytes(i for i in ids if i < 256).decode(errors="replace")


def byte_level() -> Core:
    """A trained byte-level BPE: tokens are pieces of characters, characters, and words with their space."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return core


def metaspace() -> Core:
    """As Llama 2's: words carry their space in front, the decoder drops the first, unknown bytes are <0x..>."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,", "▁the", "▁a", "ing"]
    core = Core(models.BPE({p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return core


def stream(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_no_half_character_is_shown():
    ids = list("aä€🥊b".encode())
    pieces = stream(Detokenizer(by_bytes, set()), ids)
    assert pieces == ["a", "", "ä", "", "", "€", "", "", "", "🥊", "b", ""]


def test_a_character_that_is_never_completed_is_shown_at_the_end_as_what_it_is():
    assert stream(Detokenizer(by_bytes, set()), b"a\xf0\x9f") == ["a", "", "", "�"]
    # Or as soon as something else follows it.
    assert "".join(stream(Detokenizer(by_bytes, set()), b"\xf0\x9fab")) == "�ab"


def test_bytes_that_can_be_no_character_are_not_held_for_ever():
    detokenizer = Detokenizer(by_bytes, set())
    shown = "".join(detokenizer.add(0xFF) for _ in range(100))
    assert len(shown) >= 97
    assert shown + detokenizer.finish() == "�" * 100


@pytest.mark.parametrize("length", [1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 5 * WINDOW + 3])
def test_bytes_joined_are_the_text(length):
    data = TEXT.encode()[:length]
    assert "".join(stream(Detokenizer(by_bytes, set()), data)) == data.decode(errors="replace")


@pytest.mark.parametrize("core", [byte_level(), metaspace()], ids=["byte-level", "metaspace"])
def test_pieces_joined_are_the_decoding_of_all_tokens(core):
    draw = random.Random(5)

    def decode(ids: Sequence[int]) -> str:
        return str(core.decode(list(ids), skip_special_tokens=False))

    for _ in range(30):
        words = draw.choices([*TEXT.split(), "the", "a", "thing", "é", "🥊"], k=draw.randrange(1, 60))
        ids = core.encode(" ".join(words)).ids
        pieces = stream(Detokenizer(decode, set()), ids)
        assert "".join(pieces) == decode(ids)
        assert "�" not in "".join(pieces[:-1])


@pytest.mark.parametrize("core", [byte_level(), metaspace()], ids=["byte-level", "metaspace"])
def test_after_a_prompt_the_space_before_a_word_is_kept(core):
    def decode(ids: Sequence[int]) -> str:
        return str(core.decode(list(ids), skip_special_tokens=False))

    ids = core.encode("the thing and a thing").ids
    for cut in range(1, len(ids)):
        before, after = ids[:cut], ids[cut:]
        expected = decode(ids)[len(decode(before)) :]
        assert "".join(stream(Detokenizer(decode, set(), before), after)) == expected


def test_a_long_prompt_is_no_longer_than_its_end():
    seen: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return by_bytes(ids)

    detokenizer = Detokenizer(decode, set(), b"x" * 10_000)
    for byte in b"y" * 1000:
        detokenizer.add(byte)
    assert max(seen) <= WINDOW + CONTEXT


def test_a_prompt_that_ends_within_a_character():
    first, rest = b"a\xe2\x82", b"\xacb"
    text = "".join(stream(Detokenizer(by_bytes, set(), first), rest))
    assert text.endswith("b") and "€" not in text


def test_bytes_that_are_no_character_among_some_that_are():
    core = metaspace()

    def decode(ids: Sequence[int]) -> str:
        return str(core.decode(list(ids), skip_special_tokens=False))

    # With byte fallback one wrong byte takes back the characters next to it: what was shown stays, the rest follows.
    data = "日本".encode() + b"\xff" + "語の".encode()
    ids = [1 + byte for byte in data] + core.encode("the").ids
    pieces = stream(Detokenizer(decode, set()), ids)
    assert "".join(pieces).startswith("日本�") and "".join(pieces).endswith("the") and "日" not in "".join(pieces)[1:]


def test_the_window_has_an_end_for_any_decoder():
    seen: list[int] = []

    def decode(ids: Sequence[int]) -> str:
        seen.append(len(ids))
        return f"{len(ids)}:" + "x" * len(ids)

    detokenizer = Detokenizer(decode, set())
    for token in range(2000):
        detokenizer.add(token)
    assert max(seen) <= 4 * WINDOW + 1


def test_special_tokens_have_no_text():
    detokenizer = Detokenizer(by_bytes, {EOS}, [EOS, *b"ab", EOS])
    assert stream(detokenizer, [*b"c", EOS, *"ä".encode(), EOS]) == ["c", "", "", "ä", "", ""]
    assert stream(Detokenizer(by_bytes, {EOS}), [EOS]) == ["", ""]


def cut(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    """(the text shown, the stop string) for text that comes in pieces."""
    strings, shown = StopStrings(stops), ""
    for piece in pieces:
        text, stop = strings.add(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + strings.finish(), None


def test_a_stop_string_is_found_across_pieces_and_not_shown():
    assert cut(["abc", "ST", "OP", "def"], ["STOP"]) == ("abc", "STOP")
    assert cut(["abcSTOPdef"], ["STOP"]) == ("abc", "STOP")
    assert cut(list("xxSTSTOP"), ["STOP"]) == ("xxST", "STOP")


def test_what_only_begins_like_one_is_shown_after_all():
    strings = StopStrings(["STOP"])
    assert strings.add("aST") == ("a", None)
    assert strings.add("A") == ("STA", None)
    assert strings.add("STO") == ("", None)
    assert strings.finish() == "STO" and strings.finish() == ""


def test_of_several_the_one_complete_first_counts():
    assert cut(["abcdef"], ["cdef", "bc"]) == ("a", "bc")
    assert cut(["xab"], ["b", "ab"]) == ("x", "ab")
    assert cut(["aaa"], ["aa", "a"]) == ("", "a")


def test_any_cut_of_any_text_gives_the_same():
    draw = random.Random(9)
    for _ in range(500):
        text = "".join(draw.choices("abc", k=draw.randrange(1, 25)))
        stops = ["".join(draw.choices("abc", k=draw.randrange(1, 5))) for _ in range(draw.randrange(1, 4))]
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
        at, stop = (min(ends)[1], min(ends)[2]) if ends else (len(text), None)
        assert cut(list(text), stops) == (text[:at], stop)
        pieces, rest = [], text
        while rest:
            n = draw.randrange(1, 6)
            pieces.append(rest[:n])
            rest = rest[n:]
        shown, found = cut(pieces, stops)
        # In one piece two may be complete: then, too, the one that is complete first.
        assert (shown, found) == (text[:at], stop)


def test_a_stream_of_both():
    both = TextStream(Detokenizer(by_bytes, set()), ["€!"])
    shown = [both.add(b) for b in "a€b€!".encode()]
    assert "".join(text for text, _ in shown) == "a€b" and shown[-1] == ("", "€!")
    held = TextStream(Detokenizer(by_bytes, set()), ["�x", "�"])
    assert held.add(0xE2) == ("", None)
    assert held.finish() == ("", "�")
    rest = TextStream(Detokenizer(by_bytes, set()), ["abc"])
    assert [rest.add(b)[0] for b in b"xab"] == ["x", "", ""] and rest.finish() == ("ab", None)
    assert TextStream(None, ["a"]).add(97) == ("", None) and TextStream(None, []).finish() == ("", None)
