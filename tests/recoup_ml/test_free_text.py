"""What a model writes unasked: its own, the same every time, and within its bounds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from recoup_ml import damage, models, repair
from recoup_ml.free_text import free_texts
from recoup_ml.observation import observe
from recoup_ml.repair import Repair
from recoup_ml.scores import compare
from recoup_ml.sequences import Answered


def test_texts_are_the_same_every_time_and_leave_the_dice_alone(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    before = torch.get_rng_state()
    found = free_texts(healthy, tokenizer, 12, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert free_texts(healthy, tokenizer, 12, 20) == found
    assert len({text.prompt_ids for text in found}) == 12
    assert not {first for text in found for first in text.prompt_ids} & {*tokenizer.all_special_ids}


def test_texts_are_likely_to_who_wrote_them(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """They cost the writer about its entropy; words drawn blindly would cost more."""
    found = free_texts(healthy, tokenizer, 24, 24)
    ids = [torch.tensor([text.prompt_ids + text.answer_ids]) for text in found]
    noise = [torch.randint(len(tokenizer), text_1T.shape) for text_1T in ids]
    with torch.inference_mode():
        own, blind = (
            sum(float(healthy(input_ids=text_1T, labels=text_1T).loss) for text_1T in texts)
            for texts in (ids, noise)
        )
    assert own < 0.7 * blind


def test_a_short_context_bounds_them(
    healthy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(healthy.config, "max_position_embeddings", 8)
    assert max(map(len, free_texts(healthy, tokenizer, 12, 20))) == 8


def test_a_reconstruction_that_saw_them_is_nearer_on_such_text(
    student: Callable[[str], Path],
    teacher: Path,
    healthy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    answered: list[Answered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Judged on others than those that it saw: a longer row of draws is another one."""
    found = damage.inspect(student("pruned"), teacher)
    others = free_texts(healthy, tokenizer, 96, 24)[32:]

    def distance(seen: int) -> float:
        monkeypatch.setattr(repair, "FREE_TEXTS", seen)
        model = models.load(student("pruned"))
        repair.fit(Repair("reconstruct", 0.5), model, teacher, found, answered[:8], 0)
        return compare(observe(healthy, others, 0), observe(model, others, 0), others).mean_kl

    assert distance(32) < 0.7 * distance(1)
