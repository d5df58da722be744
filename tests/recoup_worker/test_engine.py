"""The local engine answers as transformers and peft do, in vLLM's dialect."""

import json
import time

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from starlette.testclient import TestClient
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from recoup_jobs.settings import Settings
from recoup_worker.engine import create_engine

WORDS = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(61))]
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}w60"
ONE, TWO = f"dep_{'1' * 24}", f"dep_{'2' * 24}"


def write_student(folder, seed):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        **shape,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    known = Tokenizer(WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, **special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    torch.set_num_threads(1)
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    root = settings.model_roots[0]
    for seed, name in enumerate(("student", "other")):
        write_student(root / name, seed)
    for seed, (id, base) in enumerate(((ONE, "student"), (TWO, "student"))):
        model = AutoModelForCausalLM.from_pretrained(root / base)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        set_seed(seed)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data.normal_(0, 0.5)
        adapted.save_pretrained(settings.deployments_dir / id)
    return settings


@pytest.fixture
def engine(settings):
    with TestClient(create_engine(settings)) as client:
        for id in (ONE, TWO):
            assert load(client, settings, id).status_code == 200
        yield client


def load(client, settings, id):
    body = {"lora_name": id, "lora_path": str(settings.deployments_dir / id)}
    return client.post("/v1/load_lora_adapter", json=body)


def by_peft(settings, id):
    model = AutoModelForCausalLM.from_pretrained(
        settings.model_roots[0] / ("other" if id == "other" else "student")
    )
    return (
        PeftModel.from_pretrained(model, settings.deployments_dir / id).eval()
        if id.startswith("dep_")
        else model
    )


@torch.inference_mode()
def greedy(model, prompt, most):
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return [WORDS[token] for token in out[0, len(prompt) :].tolist() if token != 1]


def complete(engine, **body):
    answer = engine.post("/v1/completions", json={"temperature": 0, "max_tokens": 8} | body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_bases_and_adapters_are_listed_as_vllm_lists_them(engine):
    cards = {card["id"]: card for card in engine.get("/v1/models").json()["data"]}
    assert cards.keys() == {"student", "other", ONE, TWO}
    assert (cards["student"]["parent"], cards["student"]["owned_by"]) == (None, "recoup-engine")
    assert cards[ONE]["parent"] == cards["student"]["root"]


@pytest.mark.parametrize("order", [[ONE, "student", TWO, "other", ONE], ["other", TWO, ONE]])
def test_greedy_answers_and_log_probabilities_are_those_of_peft_whoever_spoke_before(engine, settings, order):
    prompt, given = [5, 9, 33], [5, 9, 33, 7, 21, 40]
    for name in order:
        model = by_peft(settings, name)
        text = complete(engine, model=name, prompt=prompt)["choices"][0]["text"]
        assert text.split() == greedy(model, prompt, 8)
        with torch.inference_mode():
            log_p_TV = model(torch.tensor([given])).logits[0].log_softmax(-1)
        for at in range(1, len(given)):
            forced = {
                "max_tokens": 1,
                "allowed_token_ids": [given[at]],
                "logprobs": 0,
                "return_token_ids": True,
            }
            (choice,) = complete(engine, model=name, prompt=given[:at], **forced)["choices"]
            assert choice["token_ids"] == [given[at]]
            expected = float(log_p_TV[at - 1, given[at]])
            assert choice["logprobs"]["token_logprobs"] == [pytest.approx(expected, abs=1e-4)]


def test_a_chat_is_put_into_the_models_template(engine, settings):
    body = {
        "model": ONE,
        "messages": [{"role": "user", "content": "w5 w6"}],
        "temperature": 0,
        "max_tokens": 6,
    }
    answer = engine.post("/v1/chat/completions", json=body).json()
    prompt = [WORDS.index(word) for word in ("w5", "w6", "w60")]
    assert answer["choices"][0]["message"]["content"].split() == greedy(by_peft(settings, ONE), prompt, 6)
    assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("chat.completion", 3)


def test_a_stream_says_what_a_whole_answer_says(engine):
    body = {"model": ONE, "prompt": [5, 9], "stream": True, "stream_options": {"include_usage": True}}
    whole = complete(engine, model=ONE, prompt=[5, 9])
    lines = engine.post("/v1/completions", json={"temperature": 0, "max_tokens": 8} | body).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole["choices"][0]["text"]
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert "data: [DONE]" in lines


def test_samples_follow_their_seed(engine):
    ask = {"model": "student", "prompt": [5, 9], "temperature": 1.0, "n": 3, "seed": 11}
    first, again = (complete(engine, **ask)["choices"] for _ in range(2))
    assert first == again
    assert len({choice["text"] for choice in first}) > 1
    assert [choice["index"] for choice in first] == [0, 1, 2]
    assert complete(engine, **ask | {"seed": 12})["choices"] != first


def test_log_probabilities_of_an_answer_are_told(engine):
    choice = complete(engine, model=ONE, prompt=[5, 9], logprobs=2)["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["top_logprobs"])
    assert all(
        max(top.values()) == pytest.approx(p)
        for top, p in zip(told["top_logprobs"], told["token_logprobs"], strict=True)
    )


def test_several_prompts_have_an_answer_each(engine):
    both = complete(engine, model=ONE, prompt=[[5, 9], [7]])["choices"]
    alone = [complete(engine, model=ONE, prompt=ids)["choices"][0]["text"] for ids in ([5, 9], [7])]
    assert [choice["text"] for choice in both] == alone


def test_an_adapter_that_was_unloaded_answers_no_more_and_the_others_do(engine):
    before = complete(engine, model=TWO, prompt=[5])["choices"]
    assert engine.post("/v1/unload_lora_adapter", json={"lora_name": ONE}).status_code == 200
    assert engine.post("/v1/unload_lora_adapter", json={"lora_name": ONE}).status_code == 404
    gone = engine.post("/v1/completions", json={"model": ONE, "prompt": [5]})
    assert (gone.status_code, "does not exist" in gone.json()["error"]["message"]) == (404, True)
    assert complete(engine, model=TWO, prompt=[5])["choices"] == before


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": [5] * 64},
        {"prompt": []},
        {"prompt": [len(WORDS)]},
    ],
)
def test_a_prompt_that_the_model_cannot_take_is_refused(engine, change):
    refused = engine.post("/v1/completions", json={"model": ONE, "prompt": [5]} | change)
    assert refused.status_code == 400
    assert complete(engine, model=ONE, prompt=[5])


@pytest.mark.parametrize(
    "body",
    [
        {"lora_name": "x", "lora_path": "/etc"},
        {"lora_name": ONE, "lora_path": "/etc"},
        {"lora_name": f"dep_{'3' * 24}"},
    ],
)
def test_only_folders_of_deployments_are_loaded(engine, settings, body):
    unknown = {"lora_path": str(settings.deployments_dir / str(body["lora_name"]))}
    assert engine.post("/v1/load_lora_adapter", json=unknown | body).status_code in {400, 404}


def test_an_answer_is_cut_where_the_longest_sequence_ends(engine):
    answer = complete(engine, model=ONE, prompt=[5] * 60, max_tokens=100)
    assert answer["usage"]["total_tokens"] <= 64


def test_requests_wait_for_their_turn(engine):
    began = time.monotonic()
    assert complete(engine, model=ONE, prompt=[5], stop=["w"])["choices"][0]["finish_reason"] == "stop"
    assert time.monotonic() - began < 5
