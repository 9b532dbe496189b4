"""A vocabulary of K2's true size in which the tokens of published examples have their true ids.

The examples are renders of K2-Instruct-0905's template (revision ac6c49f0) with the released
tokenizer, and texts of vLLM's tests in the released tokens: ids and texts from
github.com/YS-OH-CORE/canitoolcall, ``fixtures/kimi/{k2i-render,imported}.jsonl``. Every other rank
is a filler that no text contains. Where an example cuts one word into two tokens, where it is cut
is a guess; the ids are not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.reference.kimi_tokenizer import rank_file
from tests.unit.chat.kimi_files import write_tokenizer

NUM_RANKS = 163_584
WORDS = {
    **{"functions": 41937, ".get": 1150, "_we": 21055, "ather": 2800, '{"': 8264, "city": 37666},
    **{'":': 1289, ' "': 414, "Paris": 113476, '",': 665, "unit": 8175, "cels": 78841},
    **{"ius": 14211, '"}': 16934, "Let": 9413, " me": 1019, " check": 2598, " that": 473},
    **{" for": 395, " you": 398, "Ber": 67347, "lin": 4797, " is": 387, " the": 276},
    **{" capital": 10484, " of": 318, " France": 15383, "Multiple": 33251, " tasks": 12757},
    **{"New": 5632, " York": 7282, "_news": 126818, "topic": 30547, "technology": 65785},
    **{".send": 14131, "_email": 28599, "to": 1753, "user": 2482, "example": 17480, ".com": 1304},
    **{"subject": 37407, "Daily": 62156, " Update": 10829, "No": 4729, " prefix": 14280},
    **{"get": 618, "Tok": 39818, "yo": 18009, "Reason": 24977, "ing": 288, " sp": 1284},
    **{"urious": 26163, " noise": 18226, ".test": 9478, "Before": 13295, " After": 6671},
    **{" tools": 7697},
}


def _ids(text: str) -> list[int]:
    return [int(number) for number in text.split()]


SINGLE = '{"city": "Paris", "unit": "celsius"}'
SINGLE_IDS = _ids(
    "163595 163597 41937 1150 21055 2800 25 15 163598 8264 37666 1289 414 113476 665 414 8175 "
    "1289 414 78841 14211 16934 163599 163596"
)
BEFORE_IDS = _ids(
    "9413 1019 2598 473 395 398 13 163595 163597 41937 1150 21055 2800 25 15 163598 8264 "
    "37666 1289 414 67347 4797 16934 163599 163596"
)
PLAIN_IDS = _ids("113476 387 276 10484 318 15383 13")
RENDERED = {
    "a call": ("", [("get_weather", SINGLE)], SINGLE_IDS),
    "content before a call": (
        "Let me check that for you.",
        [("get_weather", '{"city": "Berlin"}')],
        BEFORE_IDS,
    ),
    "no call": ("Paris is the capital of France.", [], PLAIN_IDS),
}
"""Name: content, calls (name, arguments), and the ids of the answer in the release's render."""
THREE_IDS = _ids(
    "33251 12757 13 220 163595 163597 41937 1150 21055 2800 25 15 220 163598 8264 37666 1289 "
    "414 5632 7282 16934 163599 163597 41937 1150 126818 25 16 220 163598 8264 30547 1289 414 "
    "65785 16934 163599 163597 41937 14131 28599 25 17 220 163598 8264 1753 1289 414 2482 31 "
    "17480 1304 665 414 37407 1289 414 62156 10829 16934 163599 163596"
)
NO_PREFIX_IDS = _ids(
    "4729 14280 13 220 163595 163597 618 21055 2800 25 15 220 163598 8264 37666 1289 414 "
    "39818 18009 16934 163599 163596"
)
NOISE_IDS = _ids(
    "24977 288 13 220 163595 1284 26163 18226 220 163597 41937 9478 25 15 220 163598 8264 "
    "74 1289 414 85 16934 220 163599 163596"
)
AFTER_IDS = _ids(
    "13295 13 220 163595 163597 41937 1150 21055 2800 25 15 220 163598 8264 37666 1289 414 "
    "39818 18009 16934 220 163599 163596 6671 7697 13"
)
EMPTY_IDS = _ids("24977 288 13 220 163595 163596")
SPACE = "white space around the id '{} '"
IMPORTED = {
    "three calls": (
        THREE_IDS,
        "Multiple tasks. ",
        [
            ("get_weather", '{"city": "New York"}'),
            ("get_news", '{"topic": "technology"}'),
            ("send_email", '{"to": "user@example.com", "subject": "Daily Update"}'),
        ],
        [
            SPACE.format("functions.get_weather:0"),
            SPACE.format("functions.get_news:1"),
            SPACE.format("functions.send_email:2"),
        ],
    ),
    "an id without functions": (
        NO_PREFIX_IDS,
        "No prefix. ",
        [("get_weather", '{"city": "Tokyo"}')],
        [SPACE.format("get_weather:0"), "id 'get_weather:0' lacks 'functions.'"],
    ),
    "text between marks": (
        NOISE_IDS,
        "Reasoning.  spurious noise ",
        [("test", '{"k": "v"} ')],
        ["text between tool calls", SPACE.format("functions.test:0")],
    ),
    "text after the section": (
        AFTER_IDS,
        "Before.  After tools.",
        [("get_weather", '{"city": "Tokyo"} ')],
        [SPACE.format("functions.get_weather:0"), "text after the tool calls"],
    ),
    "an empty section": (EMPTY_IDS, "Reasoning. ", [], ["a section without tool calls"]),
}
"""Name: the ids of an answer, and its content, calls and problems as we read them."""


@cache
def _ranks() -> dict[bytes, int]:
    order = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order += [byte for byte in range(256) if byte not in order]
    ranks = {bytes([byte]): rank for rank, byte in enumerate(order)}  # tiktoken's order of bytes
    ranks |= {word.encode(): rank for word, rank in WORDS.items()}
    free = iter(sorted(set(range(NUM_RANKS)) - set(ranks.values())))
    for word in WORDS:  # the merges on the way to a word
        for length in range(2, len(word.encode())):
            ranks.setdefault(word.encode()[:length], -1)
    for token in [token for token, rank in ranks.items() if rank < 0]:
        ranks[token] = next(free)
    for rank in free:
        ranks[b"\xff" + rank.to_bytes(3)] = rank
    return ranks


def write_released_tokenizer(folder: Path) -> Path:
    """Write the vocabulary as a release's tokenizer, without tokenizer_config.json: K2's names."""
    write_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tiktoken.model").write_bytes(rank_file(_ranks()))
    return folder
