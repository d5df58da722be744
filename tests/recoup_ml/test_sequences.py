"""Prompts as token ids, answers in batches, and where an answer is predicted."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup.schemas import Message, Prompt
from recoup_ml.sequences import (
    Answered,
    batches,
    collate,
    encode,
    packs,
    read_jsonl,
    shared_tokens,
    with_prompts,
    write_jsonl,
)


def test_a_prompt_is_encoded_by_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [Message(role="system", content="Route"), Message(role="user", content="copy : red fox")]
    (item,) = encode([Prompt(messages=turns, kind="copy")], tokenizer, 64)
    assert tokenizer.decode(item.ids) == "<|system|> Route </s> <|user|> copy : red fox </s> <|assistant|>"
    assert (item.text, item.kind) == ("copy : red fox", "copy")


def test_without_a_chat_template_a_prompt_is_plain_text(teacher: Path) -> None:
    plain = PreTrainedTokenizerFast.from_pretrained(teacher)
    plain.chat_template = None
    turns = [Message(role="system", content="Route"), Message(role="user", content="copy : red fox")]
    (item,) = encode([Prompt(messages=turns)], plain, 64)
    assert plain.decode(item.ids) == "Route copy : red fox"


def test_a_prompt_that_is_too_long_is_dropped(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> None:
    lengths = [len(item.ids) for item in encode(prompts, tokenizer, 512)]
    limit = sorted(lengths)[len(lengths) // 2]
    kept = encode(prompts, tokenizer, limit)
    assert len(kept) == sum(length <= limit for length in lengths) < len(prompts)


@pytest.mark.parametrize("tokens", [1, 30, 64, 10_000])
def test_batches_hold_every_sequence_once_within_their_budget(answered: list[Answered], tokens: int) -> None:
    found = list(batches(answered, 0, tokens))
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(answered)))
    for batch in found:
        assert batch.ids_BT.numel() <= tokens or len(batch.rows) == 1


def test_a_batch_holds_the_tokens_and_masks_the_rest(answered: list[Answered]) -> None:
    rows = [3, 0, 7]
    batch = collate(answered, rows, pad_id=99)
    for place, row in enumerate(rows):
        tokens = [*answered[row].prompt_ids, *answered[row].answer_ids]
        assert batch.ids_BT[place, : len(tokens)].tolist() == tokens
        assert set(batch.ids_BT[place, len(tokens) :].tolist()) <= {99}
        assert batch.mask_BT[place].tolist() == [1] * len(tokens) + [0] * (
            batch.ids_BT.shape[1] - len(tokens)
        )
        assert int(batch.answer_BT[place].sum()) == len(answered[row].answer_ids)


@torch.inference_mode()
def test_answer_positions_predict_the_answer(healthy: PreTrainedModel, answered: list[Answered]) -> None:
    """log p(answer) from a batch is that of each sequence alone, by transformers' own forward pass."""
    batch = collate(answered, range(len(answered)), pad_id=0)
    log_p_BTV = healthy(input_ids=batch.ids_BT, attention_mask=batch.mask_BT).logits.log_softmax(-1)
    log_p_N = log_p_BTV[batch.answer_BT].gather(1, batch.targets_N[:, None]).flatten()
    sizes = [len(sequence.answer_ids) for sequence in answered]
    for sequence, ours_A in zip(answered, log_p_N.split(sizes), strict=True):
        ids = torch.tensor([*sequence.prompt_ids, *sequence.answer_ids])
        alone_TV = healthy(input_ids=ids[None]).logits[0].log_softmax(-1)
        first = len(sequence.prompt_ids)
        expected = torch.stack([alone_TV[at - 1, ids[at]] for at in range(first, len(ids))])
        torch.testing.assert_close(ours_A, expected, rtol=1e-4, atol=1e-4)


def test_answers_survive_a_file(tmp_path: Path) -> None:
    answers = [Answered("kind", "line\nbreak \u2028 \x85 “ü”", (1, 2), "", (3,), "length")]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    assert read_jsonl(tmp_path / "answers.jsonl") == answers


def test_packs_hold_every_sequence_once_and_no_padding(answered: list[Answered]) -> None:
    found = list(packs(answered, 64))
    assert sorted(row for batch in found for row in batch.rows) == list(range(len(answered)))
    assert all(batch.ids_BT.shape[1] <= 64 for batch in found)
    assert sum(batch.ids_BT.numel() for batch in found) == sum(map(len, answered))
    for batch in found:
        ids = [
            token for row in batch.rows for token in (*answered[row].prompt_ids, *answered[row].answer_ids)
        ]
        assert batch.ids_BT[0].tolist() == ids
        assert batch.places_BT[0].tolist() == [p for row in batch.rows for p in range(len(answered[row]))]
        assert int(batch.answer_BT.sum()) == len(batch.targets_N)


def test_what_all_prompts_begin_with_stands_in_a_row_once() -> None:
    prompts = [(7, 7, 1, 2), (7, 7, 1), (7, 7, 1, 2, 5, 6)]
    rows = [Answered("", "", prompt, "", (8 + at, 9), "stop") for at, prompt in enumerate(prompts)]
    assert shared_tokens(prompts) == 2, "the second prompt's last token says what its answer begins with"
    (batch,) = packs(rows, 32, 2)
    assert batch.ids_BT.tolist() == [[7, 7, 1, 2, 5, 6, 10, 9, 1, 2, 8, 9, 1, 9, 9]]
    assert batch.places_BT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 2, 3, 4, 5, 2, 3, 4]]
    following = torch.cat([batch.ids_BT[0, 1:], torch.tensor([-1])])
    assert following[batch.answer_BT[0]].tolist() == batch.targets_N.tolist() == [10, 9, 8, 9, 9, 9]
    assert batch.sees_BTT[0, 9].nonzero().flatten().tolist() == [0, 1, 8, 9]
    assert [len(part.rows) for part in packs(rows, 10, 2)] == [1, 2]
    longer = [Answered("", "", (*range(20), at), "", (8, 9), "stop") for at in range(4)]
    assert [len(part.rows) for part in packs(longer, 16, 20)] == [2, 2], "of much that is shared half is left"


def test_with_prompts_all_counts_but_what_they_begin_with() -> None:
    prompts = [(7, 7, 1, 2), (7, 7, 1), (7, 7, 5)]
    rows = [Answered("kind", "text", prompt, "said", (8, 9), "stop") for prompt in prompts]
    found = [(row.prompt_ids, row.answer_ids) for row in with_prompts(rows)]
    assert found == [((7, 7, 1), (2, 8, 9)), ((7, 7, 1), (8, 9)), ((7, 7, 5), (8, 9))]
    alone = [Answered("", "", (4,), "", (8, 9), "stop")]
    assert with_prompts(alone) == alone


def test_a_pack_says_which_token_each_position_predicts(answered: list[Answered]) -> None:
    (batch,) = packs(answered[:5], 10_000)
    following = torch.cat([batch.ids_BT[0, 1:], torch.tensor([-1])])
    assert torch.equal(following[batch.answer_BT[0]], batch.targets_N)


def test_a_sequence_that_is_too_long_has_a_pack_of_its_own(answered: list[Answered]) -> None:
    assert [len(batch.rows) for batch in packs(answered[:4], 1)] == [1, 1, 1, 1]
