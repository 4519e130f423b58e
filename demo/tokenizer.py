"""A byte-level BPE tokenizer trained on the corpus, with its special tokens and chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from demo.corpus.documents import ASSISTANT, BOS, EOS, PAD, USER, labelled_documents
from demo.corpus.grammar import BASE64_TEXT

VOCABULARY = 2048
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
        text = re.sub(r"<\|\w+\|>", "\n", document.text)
        yield text if number % 40 == 0 else BASE64_TEXT.sub("", text)


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
