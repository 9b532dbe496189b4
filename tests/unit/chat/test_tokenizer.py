"""Kimi's tokenizer against tiktoken used directly, and against a slow twin of every rule."""

import base64
import hashlib
import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken

from megatron_k2.chat.special_tokens import CONTROL_TOKENS, NUM_SPECIAL
from megatron_k2.chat.tokenizer import PATTERN, KimiTokenizer, _cut_runs, presplit
from tests.reference import kimi_tokenizer as twin
from tests.unit.chat.kimi_files import small_ranks, write_tokenizer

PARTS = [
    *(
        "a",
        "B",
        "ab",
        "The",
        "'s",
        "'LL",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "1",
        "23",
        "4567",
        ".",
        "!?",
    ),
    *(
        "你",
        "好世界",
        "日本語の",
        "テ",
        "é",
        "é",
        "a̐",
        "İ",
        "ß",
        "ǅ",
        "ª",
        "😀",
        "\u3000",
        "\u200d",
    ),
    *("<|im_end|>", "[EOS]", "<|reserved_token_461|>", "<|tool_call_begin|>", "\x85", "\x1c", "٣"),
]
LONG = {
    "60,000 spaces": " " * 60_000,
    "600,000 characters": "several words 12 你好, " * 30_000,
    "40,000 digits": "7" * 40_000,
    "60,000 Han": "漢" * 60_000,
    "50,001 line feeds": "\n" * 50_001,
    "60,000 letters": "the" * 20_000,
    "runs at the limit": ("a" * 25_000 + " " * 25_001) * 3 + "b" * 25_001,
    "a run over the slice's edge": "x " * 195_000 + "y" * 30_000,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("release"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> KimiTokenizer:
    return KimiTokenizer(folder)


@pytest.fixture(scope="module")
def plain() -> tiktoken.Encoding:
    """Tiktoken itself with the pattern, the ranks and no special ids."""
    return tiktoken.Encoding("t", pat_str=PATTERN, mergeable_ranks=small_ranks(), special_tokens={})


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(PARTS, k=rng.randint(0, 30))) for _ in range(count)]


def test_pattern_is_the_released_one() -> None:
    # SHA-256 of pat_str in K2-Instruct (revision fd1984e2), K2-Instruct-0905 (ac6c49f0), K2.5, K2.6
    # and K3, recorded by a public script that downloads tokenization_kimi.py and hashes it
    # ("Reproduce Contextimate's pinned open-tokenizer calibration", KIMI_PATTERN_HASH).
    released = "de5781783b193d5ccf5b1b28edfa70fa816ce78d54603fdc422cfd8d4ea4411f"
    assert hashlib.sha256(PATTERN.encode()).hexdigest() == released


def test_ids_are_those_of_tiktoken_and_of_the_slow_twin(tokenizer, plain) -> None:
    for text in random_texts(600):
        ids = tokenizer.encode(text)
        assert ids == plain.encode_ordinary(text) == twin.encode(text, small_ranks()), text
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", LONG)
def test_long_texts_are_cut_as_the_release_cuts_them(tokenizer, plain, name: str) -> None:
    text = LONG[name]
    pieces = twin.presplit(text)
    assert len(pieces) > 1
    assert list(presplit(text)) == pieces
    ids = list(itertools.chain.from_iterable(plain.encode_ordinary_batch(pieces)))
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


def test_cuts_change_ids(tokenizer, plain) -> None:
    """Without them a word on the cut would be other tokens: the rule is worth its lines."""
    text = LONG["60,000 letters"]
    assert tokenizer.encode(text) != plain.encode_ordinary(text)


def test_cut_runs_equals_the_twin_on_all_short_texts() -> None:
    for length in range(9):
        for text in map("".join, itertools.product("a ", repeat=length)):
            for limit in (1, 2, 3, 4):
                cut = [piece for piece in _cut_runs(text, limit) if piece]
                assert cut == [piece for piece in twin.presplit(text, 100, limit) if piece], text


def test_white_space_of_the_windows_is_that_of_isspace() -> None:
    """``rstrip`` and ``rsplit`` of the fast cuts agree with ``isspace`` on every character."""
    characters = list(map(chr, range(0x110000)))
    white = "".join(character for character in characters if character.isspace())
    other = "".join(character for character in characters if not character.isspace())
    assert white.rstrip() == "" and white.split() == []
    assert other.rsplit() == [other] and all(character.rstrip() for character in other)


def test_the_room_needs_neither_torch_nor_megatron() -> None:
    code = (
        "import pkgutil, sys, megatron_k2.chat as room\n"
        "for module in pkgutil.iter_modules(room.__path__, room.__name__ + '.'):\n"
        "    __import__(module.name)\n"
        "print({'torch', 'megatron.core', 'transformers', 'jsonschema'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_names_of_control_tokens_in_text_stay_text(tokenizer) -> None:
    text = "".join(tokenizer.special_tokens)
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.num_ranks
    assert tokenizer.decode(ids) == text


def test_control_tokens_are_ids_when_asked_for(tokenizer) -> None:
    base = tokenizer.num_ranks
    text = f"<|im_user|>user<|im_middle|>a [EOS]<|reserved_token_{base + 5}|>"
    ids = tokenizer.encode(text, control_tokens=True)
    assert [i for i in ids if i >= base] == [base + offset for offset in (3, 17, 1, 5)]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == "usera "


def test_text_without_control_tokens_is_the_same_both_ways(tokenizer) -> None:
    for text in random_texts(300, seed=1):
        if not any(name in text for name in tokenizer.special_tokens):
            assert tokenizer.encode(text, control_tokens=True) == tokenizer.encode(text)


def test_256_special_ids_follow_the_ranks(tokenizer) -> None:
    base = tokenizer.num_ranks
    assert list(tokenizer.special_tokens.values()) == list(range(base, base + NUM_SPECIAL))
    assert tokenizer.vocab_size == base + NUM_SPECIAL
    assert (
        tokenizer.special_tokens.items() >= {n: base + o for n, o in CONTROL_TOKENS.items()}.items()
    )
    assert tokenizer.special_id(f"<|reserved_token_{base + 5}|>") == base + 5
    assert (tokenizer.bos_id, tokenizer.eos_id) == (base, base + 1)
    assert (tokenizer.unk_id, tokenizer.pad_id) == (base + 254, base + 255)
    # The class of K2 has two more, which config.json's vocabulary has not.
    past = f"<|reserved_token_{base + NUM_SPECIAL}|>"
    assert max(tokenizer.encode(past, control_tokens=True)) < base
    with pytest.raises(ValueError, match="no special token"):
        tokenizer.special_id(past)


def test_marks_of_tool_calls_survive_skipping(tokenizer) -> None:
    text = "<|tool_calls_section_begin|>a<|tool_calls_section_end|><|im_end|>"
    ids = tokenizer.encode(text, control_tokens=True)
    assert tokenizer.decode(ids, skip_special=True) == text.removesuffix("<|im_end|>")


def test_a_bare_rank_file_has_kimis_names(folder: Path, tmp_path: Path, tokenizer) -> None:
    bare = tmp_path / "small.tiktoken"
    bare.write_bytes((folder / "tiktoken.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("another tokenizer's")
    assert KimiTokenizer(bare).special_tokens == tokenizer.special_tokens
    assert KimiTokenizer(folder / "tiktoken.model").digest == tokenizer.digest


def test_names_of_tokenizer_config_win(tmp_path: Path) -> None:
    base = len(small_ranks())
    added = {str(base + 2): {"content": "<|end_of_msg|>"}, str(base): {"content": "[BOS]"}}
    added |= {str(base + 254): {"content": "[UNK]"}, str(base + 255): {"content": "[PAD]"}}
    config = {"added_tokens_decoder": added, "eos_token": {"content": "<|end_of_msg|>"}}
    tokenizer = KimiTokenizer(write_tokenizer(tmp_path, **config))
    assert tokenizer.eos_id == base + 2
    assert tokenizer.special_id(f"<|reserved_token_{base + 3}|>") == base + 3


def test_digest_follows_ranks_and_names(tmp_path: Path, tokenizer) -> None:
    same = KimiTokenizer(write_tokenizer(tmp_path / "same"))
    other = KimiTokenizer(write_tokenizer(tmp_path / "other", eos_token="<|im_end|>"))
    assert same.digest == tokenizer.digest != other.digest


def test_rank_file_is_read_from_its_place(tmp_path: Path) -> None:
    """tiktoken's loader would return the first file again from its cache."""
    folder = write_tokenizer(tmp_path)
    before = KimiTokenizer(folder).num_ranks
    lines = (folder / "tiktoken.model").read_bytes().splitlines(keepends=True)
    (folder / "tiktoken.model").write_bytes(b"".join(lines[:-1]))
    (folder / "tokenizer_config.json").unlink()
    assert KimiTokenizer(folder).num_ranks == before - 1


def test_edges_of_text_and_ids(tokenizer) -> None:
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert tokenizer.decode(tokenizer.encode("\ud83d")) == "�"
    assert tokenizer.decode(tokenizer.encode("ß")[:1]) == "�"
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token {token} is outside the vocabulary of"):
            tokenizer.decode([0, token])
        with pytest.raises(ValueError, match=f"token {token} is outside"):
            tokenizer.token_bytes(token)


BYTES = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*BYTES, b"YWI= 256", b"YWI= 257"], r"line 258: token b'ab' is already in line 257"),
        ([*BYTES, b"YWI= 255"], r"line 257: rank 255 is already in line 256"),
        ([*BYTES, b"YWI= 300"], r"line 257: rank 300 in a file of 257 tokens: rank 256 is missing"),
        ([*BYTES, b"YWI 256"], r"line 257: b'YWI' is not base64"),
        ([*BYTES, b"Y*I= 256"], r"line 257: b'Y\*I=' is not base64"),
        ([*BYTES, b"YWI="], r"line 257: not base64, a space and a rank, but b'YWI='"),
        ([*BYTES, b"YWI= -1"], r"line 257: not base64, a space and a rank"),
        ([*BYTES[:-1], b"YWI= 255"], r"byte 0xff is not among its 256 tokens"),
        ([b""], "holds no ranks"),
        ([b"version https://git-lfs.github.com/spec/v1"], "a Git LFS pointer"),
    ],
)
def test_a_bad_rank_file_is_refused_by_line(tmp_path: Path, lines: list[bytes], message: str):
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(ValueError, match=message):
        KimiTokenizer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": {"7": {"content": "x"}}}, "special token 7 'x' is not among"),
        ({"added_tokens_decoder": {"a": {"content": "x"}}}, "added_tokens_decoder is malformed"),
        ({"added_tokens_decoder": {"460": {}}}, "added_tokens_decoder is malformed"),
        ({"eos_token": "</s>"}, "eos_token '</s>' is not among the special ids"),
        (
            {"added_tokens_decoder": {"457": {"content": "x"}, "458": {"content": "x"}}},
            "457 and 458 are both named 'x'",
        ),
    ],
)
def test_bad_names_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KimiTokenizer(write_tokenizer(tmp_path, **changes))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiktoken\.model: No such file"):
        KimiTokenizer(tmp_path)
    folder = write_tokenizer(tmp_path)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: not readable as JSON"):
        KimiTokenizer(folder)
