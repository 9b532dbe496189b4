"""What a model says to a cloze question: which candidate it prefers, and what it writes itself.

*Choice*: the candidate with the highest log-likelihood as continuation of the prompt, summed over
its tokens; those of one attribute are of one kind and similar length. *Exact*: greedy decoding
writes the answer and then ends the word; greedy decoding of given tokens is the argmax at each of
them. The prompt stands at a document's beginning. Candidates that begin alike share their passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from torch import Tensor

SPACE = "\u2581"  # what a sentencepiece token that begins a word begins with
BATCH_TOKENS = 8192  # of a forward pass, padding included
AT_ONCE = 200  # questions whose log-probabilities are held: some 20 MB a 1,000 of vocabulary

Forward = Callable[[Tensor], Tensor]
"""Token ids int64 [b, s] to logits [b, s, vocabulary, which may be padded]."""
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Cloze:
    """A prompt's ids, with the end of a document before it, and those of its candidates."""

    prompt: Ids
    candidates: tuple[Ids, ...]
    answer: int
    """Place among the candidates."""

    def rows(self) -> list[Ids]:
        """Return continuations of the prompt whose logits hold all that is asked for.

        These are the candidates without their last tokens and the whole answer, without those that
        begin another one.
        """
        wanted = {candidate[:-1] for candidate in self.candidates}
        wanted.add(self.candidates[self.answer])
        inner = {row[:n] for row in wanted for n in range(len(row))}
        return sorted(wanted - inner)


@dataclass(frozen=True)
class Verdict:
    """Of one question."""

    choice: bool
    exact: bool


def encode(tokenizer: Any, prompt: str, candidates: Sequence[str], answer: str) -> Cloze:
    """Return the ids of a question.

    Args:
        tokenizer: a sentencepiece processor.
        prompt: does not end with a blank.
        candidates: begin with letters or figures, so that each begins a token behind the blank.
        answer: one of them.
    """
    before = tuple(tokenizer.encode(prompt))
    found = []
    for candidate in candidates:
        whole = tuple(tokenizer.encode(f"{prompt} {candidate}"))
        assert whole[: len(before)] == before, f"{candidate!r} begins within a token"
        found.append(whole[len(before) :])
    return Cloze((tokenizer.eos_id(), *before), tuple(found), candidates.index(answer))


def ends_of_words(tokenizer: Any) -> Tensor:
    """Return bool [vocabulary]: the token begins another word, or is no letter or figure."""
    pieces = tokenizer.id_to_piece(list(range(tokenizer.get_piece_size())))
    return torch.tensor([piece.startswith(SPACE) or not piece[:1].isalnum() for piece in pieces])


@torch.no_grad()
def judge(forward: Forward, questions: Sequence[Cloze], ends_word: Tensor) -> list[Verdict]:
    """Return what a model says to questions.

    Args:
        forward: the model.
        questions: any number.
        ends_word: bool [vocabulary], of `ends_of_words`.
    """
    verdicts: list[Verdict] = []
    for group in batched(questions, AT_ONCE):
        tables = _asked(forward, group, len(ends_word))
        verdicts += [_verdict(q, table, ends_word) for q, table in zip(group, tables, strict=True)]
    return verdicts


def _asked(
    forward: Forward, questions: Sequence[Cloze], vocab_size: int
) -> list[dict[Ids, Tensor]]:
    """Return, of each question: continuation so far -> log-probabilities of the next token."""
    flat = [(n, row) for n, question in enumerate(questions) for row in question.rows()]
    needed = [{c[:i] for c in q.candidates for i in range(len(c))} for q in questions]
    tables: list[dict[Ids, Tensor]] = [{} for _ in questions]
    for batch in _batches([len(questions[n].prompt) + len(row) for n, row in flat]):
        chosen = [flat[place] for place in batch]
        logits = forward(_padded([questions[n].prompt + row for n, row in chosen]))
        for place, (n, row) in enumerate(chosen):
            first = len(questions[n].prompt) - 1
            here = logits[place, first : first + len(row) + 1, :vocab_size]
            here = here.float().log_softmax(-1)
            whole = questions[n].candidates[questions[n].answer]
            for i in range(len(row) + 1):
                if row[:i] in needed[n] or row[:i] == whole:
                    tables[n][row[:i]] = here[i]
    return tables


def _verdict(question: Cloze, table: dict[Ids, Tensor], ends_word: Tensor) -> Verdict:
    scores = [
        sum(float(table[c[:i]][token]) for i, token in enumerate(c)) for c in question.candidates
    ]
    mine = scores.pop(question.answer)
    answer = question.candidates[question.answer]
    exact = all(int(table[answer[:i]].argmax()) == token for i, token in enumerate(answer))
    exact = exact and bool(ends_word[int(table[answer].argmax())])
    return Verdict(all(mine > other for other in scores), exact)  # a tie is no knowledge


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield indices of rows of similar length."""
    batch: list[int] = []
    for n in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[n] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(n)
    if batch:
        yield batch


def _padded(rows: Sequence[Ids]) -> Tensor:
    """Return int64 [b, s]; what stands behind a row's end changes nothing before it."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])
