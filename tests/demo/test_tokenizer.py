from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from demo.corpus.documents import EOS, NONE, labelled_documents, tokenise
from demo.corpus.sentences import DOMAINS
from demo.model import MAX_POSITIONS
from demo.prompts import DOMAIN_PROMPTS, NEUTRAL_PROMPTS
from demo.tokenizer import CHAT_TEMPLATE, VOCABULARY, tokenizer_texts, train_tokenizer

MODEL = Path(__file__).parents[2] / "sae_weights" / "demo" / "model"
CHAT = [
    {"role": "user", "content": " Tell me something. "},
    {"role": "assistant", "content": "It rained."},
    {"role": "user", "content": "Go on."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    return loaded


def test_text_survives_the_round_trip(tokenizer: PreTrainedTokenizerBase) -> None:
    for document in labelled_documents(11, 60):
        ids = tokenizer(document.text)["input_ids"]
        assert tokenizer.decode(ids[1:]) == document.text
    odd = "Grüße, 東京 🙂\t\n  x"
    assert tokenizer.decode(tokenizer(odd)["input_ids"][1:]) == odd


def test_bos_opens_every_text_once(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("The man said that")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_saved_template_is_the_one_in_the_source(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_the_source_still_trains_the_committed_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    # A change to the corpus without a new model shows here, not as a model that speaks another corpus.
    fresh = train_tokenizer(tokenizer_texts(0), MAX_POSITIONS)
    assert fresh.get_vocab() == tokenizer.get_vocab()


def test_the_chat_template_reads_as_the_corpus_writes_it(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    turns = "<|user|>\nTell me something.\n<|assistant|>\nIt rained.<|eos|><|user|>\nGo on.\n<|assistant|>\n"
    assert text == f"<|bos|>{turns}"


def test_a_generation_prompt_ends_with_a_token_that_can_be_steered(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[-1] not in tokenizer.all_special_ids
    assert ids[-2] in tokenizer.all_special_ids


@pytest.mark.parametrize("prompt", [*NEUTRAL_PROMPTS, *(p for ps in DOMAIN_PROMPTS.values() for p in ps)])
def test_a_prompt_ends_with_a_token_that_can_be_steered(
    tokenizer: PreTrainedTokenizerBase, prompt: str
) -> None:
    assert tokenizer(prompt)["input_ids"][-1] not in tokenizer.all_special_ids


def test_there_are_enough_prompts_for_every_domain() -> None:
    assert len(set(NEUTRAL_PROMPTS)) >= 20
    assert set(DOMAIN_PROMPTS) == set(DOMAINS)
    assert all(len(set(prompts)) >= 10 for prompts in DOMAIN_PROMPTS.values())


def test_each_token_carries_the_domain_of_the_sentence_it_lies_in(tokenizer: PreTrainedTokenizerBase) -> None:
    for document in labelled_documents(12, 60):
        ids, domains = tokenise(document, tokenizer)
        assert len(ids) == len(domains)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]).removesuffix(EOS) == document.text.removesuffix(EOS)
        assert all(d == NONE for i, d in zip(ids, domains, strict=True) if i in tokenizer.all_special_ids)
        for domain in {domain for _, _, domain in document.spans}:
            kept = [i for i, d in zip(ids, domains, strict=True) if d == domain]
            expected = "".join(
                document.text[start:end] for start, end, name in document.spans if name == domain
            )
            assert "".join(tokenizer.decode(kept).split()) == "".join(expected.split())


def test_the_committed_model_is_whole_and_small(tokenizer: PreTrainedTokenizerBase) -> None:
    config = AutoConfig.from_pretrained(MODEL)
    assert (config.vocab_size, len(tokenizer)) == (VOCABULARY, VOCABULARY)
    assert config.head_dim >= 32
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert 3e6 < sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 14e6
    with safe_open(MODEL / "model.safetensors", "pt") as weights:
        assert weights.keys()
