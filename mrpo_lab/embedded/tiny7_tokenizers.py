"""Training of the seven tokenizers: three algorithms, and none that loses a character.

SentencePiece writes a space as U+2581 and so cannot tell the two apart. Here a piece holds the
space itself: every text without a special token decodes to what was encoded, or with ``nfc`` to
its composed form.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from math import log
from operator import itemgetter

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

TrainTokenizer = Callable[[Sequence[str], int, list[str]], Tokenizer]
"""From texts, a vocabulary size and the special tokens, both counted in it, to a tokenizer."""

GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ASCII = [chr(code) for code in (10, *range(32, 127))]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level_bpe(words: str, *, nfc: bool = False) -> TrainTokenizer:
    """BPE over bytes, as GPT-2's; merges stay within the pieces that the regex ``words`` cuts.

    ``nfc`` composes characters first, as Qwen's tokenizers do. For a Qwen2 model transformers
    does so, and cuts by ``QWEN_WORDS``, whatever the saved tokenizer says.
    """

    def train(texts: Sequence[str], vocab: int, specials: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(words), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        if nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return tokenizer

    return train


def fallback_bpe(*, across_words: bool) -> TrainTokenizer:
    """BPE over characters, as SentencePiece's; a character outside the vocabulary becomes bytes."""

    def train(texts: Sequence[str], vocab: int, specials: list[str]) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        if not across_words:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
        trainer = trainers.BpeTrainer(
            vocab_size=vocab - len(specials) - len(BYTES),
            initial_alphabet=ASCII,
            max_token_length=16,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        learned = json.loads(tokenizer.to_str())["model"]
        pieces = [*specials, *BYTES, *sorted(learned["vocab"], key=learned["vocab"].get)]
        tokenizer.model = models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[(left, right) for left, right in learned["merges"]],
            byte_fallback=True,
        )
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens(specials)
        return tokenizer

    return train


def fallback_unigram(texts: Sequence[str], vocab: int, specials: list[str]) -> Tokenizer:
    """Unigram pieces, as SentencePiece's; a character outside the vocabulary becomes bytes.

    The pieces are BPE's, scored by how often BPE uses them. The library's own trainer of unigrams
    is no choice: its result depends on the order of a hash map, so on the process.
    """
    tokenizer = fallback_bpe(across_words=False)(texts, vocab, specials)
    counts = Counter(token for text in tokenizer.encode_batch(texts) for token in text.ids)
    never = -1e3  # nats, so that the text "<0x41>" is not cut into the piece of byte 0x41
    fixed = {*specials, *BYTES}
    scores = [
        (piece, never if piece in fixed else log((1 + counts[index]) / counts.total()))
        for piece, index in sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
    ]
    unknown = tokenizer.token_to_id("<unk>")
    tokenizer.model = models.Unigram(scores, unk_id=unknown, byte_fallback=True)
    return tokenizer
