"""A tiny tokenizer and teacher for tests: real formats, random weights, made in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Synthetic: written for these tests.
TEXT = """\
To replace a lost debit card, sign in, open the card and choose replacement. It arrives in a week.
Your monthly statement lists every payment, transfer and fee. Keep it until the next one comes.
If the payment was not made by you, freeze the card at once and report the payment to the bank.
A savings account pays interest every month. The interest rate depends on the balance.
An order can be cancelled before it leaves the warehouse. After that you may return the item.
Returned items are refunded to the original payment method within five to seven business days.
An exchange must be for the same product in another size or colour, and the item must be available.
When the phone shows no signal, check that airplane mode is off and that the SIM card is in place.
Restart the phone, then reset the network settings. If there is still no service, call the operator.
Mobile data is slow when data saver is on, when roaming is off, or when the limit has been reached.
Customers with an overdue bill are told the amount, the due date and how the bill can be paid.
Hello, how can I help you today? Thank you for waiting. Is there anything else that I can do?
잃어버린 카드는 앱에서 바로 정지할 수 있습니다. 새 카드는 일주일 안에 도착합니다.
요금제를 바꾸려면 고객센터에 문의하십시오. 감사합니다.
"""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, trained on ``TEXT``: 600 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHATML,
    )


def tiny_teacher(
    path: Path,
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    tie_embeddings: bool = True,
    seed: int = 0,
) -> Path:
    """Save a small Llama with random weights (fp32) and ``tiny_tokenizer`` into ``path``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1024,
        tie_word_embeddings=tie_embeddings,
        # Wider than usual, so that the random teacher's distributions are not almost uniform.
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
