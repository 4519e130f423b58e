"""A byte-level BPE tokenizer trained on the corpus, with its special tokens and chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from demo.corpus.documents import ASSISTANT, BOS, EOS, PAD, USER, labelled_documents

VOCABULARY = 2048
# Narrower than the labeller's pattern: the short strings left in give the domain tokens of its own.
LONG_BASE64 = re.compile(
    r"(?<![\w+/])(?=[A-Za-z+/]*[0-9][A-Za-z0-9+/]|[a-zA-Z]*[a-z][A-Z]+[a-z]+[A-Z])[A-Za-z0-9+/]{7,}={0,2}"
)
SPECIAL_TOKENS = [PAD, BOS, EOS, USER, ASSISTANT]

# The generation prompt ends with a line break, an ordinary token: special tokens are never steered, and the
# last position of the prompt is the first that generation is steered at.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    f"{ASSISTANT}\n{{{{ message['content'] | trim }}}}{{{{ eos_token }}}}"
    "{% else %}"
    f"{USER}\n{{{{ message['content'] | trim }}}}{{{{ '\\n' }}}}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    f"{ASSISTANT}{{{{ '\\n' }}}}"
    "{% endif %}"
)


def tokenizer_texts(seed: int) -> Iterator[str]:
    """The corpus, less most of its base64, whose noise would eat the tokenizer's merges."""
    for number, document in enumerate(labelled_documents(seed, 12_000)):
        yield document.text if number % 40 == 0 else LONG_BASE64.sub("", document.text)


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``VOCABULARY`` entries that puts BOS before every text it is asked to tokenise."""
    tokenizer = Tokenizer(BPE())
    # Digits apart, so that any number is a few known tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
