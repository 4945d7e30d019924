"""Seven small chat models of seven architectures, pretrained on the synthetic world at first use.

They differ as a real set of references does. Each has its own tokenizer, vocabulary and chat
template, and the habits that trip scoring code:

    tiny-llama     the template writes BOS and so does the tokenizer: encode without one of them
    tiny-mistral   sliding window; turns must alternate; no pad token
    tiny-qwen2     no BOS; a default system message; tied embeddings; text is composed (NFC)
    tiny-qwen3     the template puts an empty think block into the last assistant turn
    tiny-phi3      pads on the left; pad is EOS; fused projections; unigram tokens
    tiny-gemma2    pads on the left; the template refuses a system message and trims replies
    tiny-neox      LayerNorm, parallel residuals; a vocabulary of little more than bytes

They differ in quality too: in size, in training steps, and in ``tilt``, how far their corpus
leans towards the replies that the latent preference likes (or, below 0, dislikes).
"""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as serialize
from tokenizers import processors
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from mrpo_lab.embedded import tiny7_templates
from mrpo_lab.embedded.synthetic import synthetic_corpus
from mrpo_lab.embedded.tiny7_tokenizers import (
    GPT2_WORDS,
    QWEN_WORDS,
    TrainTokenizer,
    byte_level_bpe,
    fallback_bpe,
    fallback_unigram,
)
from mrpo_lab.progress import progress

CONVERSATIONS = 2_000  # of each model's corpus
BLOCK = 128  # tokens of a training sequence
BATCH = 8  # sequences of a training step
LEARNING_RATE = 5e-3  # at its peak


@dataclass(frozen=True)
class Recipe:
    """Everything that makes one model what it is."""

    config: Callable[..., PreTrainedConfig]
    shape: dict[str, Any]  # the config's own keys
    train_tokenizer: TrainTokenizer
    vocab: int  # tokens, the special ones included
    template: str
    named: dict[str, str]  # bos_token, eos_token, pad_token
    marks: tuple[str, ...]  # the template's other special tokens
    adds_bos: bool = False  # whether the tokenizer itself puts BOS before a text
    padding_side: str = "right"
    tilt: float = 0.0  # of the corpus, see synthetic_corpus
    steps: int = 200  # of pretraining
    end_of_turn: str | None = None  # where that is not EOS


def shape(hidden: int, layers: int, heads: int, kv_heads: int, inner: int) -> dict[str, Any]:
    """Return the config keys that most decoder-only architectures share."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "max_position_embeddings": 2048,
    }


RECIPES = {
    "tiny-llama": Recipe(
        config=LlamaConfig,
        shape=shape(80, 3, 4, 2, 224),
        train_tokenizer=byte_level_bpe(GPT2_WORDS),
        vocab=600,
        template=tiny7_templates.LLAMA,
        named={"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"},
        marks=("<|start_header_id|>", "<|end_header_id|>"),
        adds_bos=True,
    ),
    "tiny-mistral": Recipe(
        config=MistralConfig,
        shape=shape(64, 3, 4, 2, 192) | {"sliding_window": 4096},
        train_tokenizer=fallback_bpe(across_words=False),
        vocab=850,
        template=tiny7_templates.MISTRAL,
        named={"bos_token": "<s>", "eos_token": "</s>"},
        marks=("[INST]", "[/INST]"),
        adds_bos=True,
        tilt=0.6,
    ),
    "tiny-qwen2": Recipe(
        config=Qwen2Config,
        shape=shape(128, 2, 4, 2, 256) | {"tie_word_embeddings": True},
        train_tokenizer=byte_level_bpe(QWEN_WORDS, nfc=True),
        vocab=800,
        template=tiny7_templates.QWEN2,
        named={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        marks=("<|im_start|>",),
    ),
    "tiny-qwen3": Recipe(
        config=Qwen3Config,
        shape=shape(96, 3, 4, 2, 224) | {"head_dim": 32, "tie_word_embeddings": True},
        train_tokenizer=byte_level_bpe(QWEN_WORDS),
        vocab=1000,
        template=tiny7_templates.QWEN3,
        named={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        marks=("<|im_start|>", "<think>", "</think>"),
        tilt=0.7,
    ),
    "tiny-phi3": Recipe(
        config=Phi3Config,
        shape=shape(80, 3, 4, 4, 192),
        train_tokenizer=fallback_unigram,
        vocab=900,
        template=tiny7_templates.PHI3,
        named={
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
        },
        marks=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        padding_side="left",
        tilt=0.6,
        end_of_turn="<|end|>",
    ),
    "tiny-gemma2": Recipe(
        config=Gemma2Config,
        shape=shape(64, 2, 2, 1, 192) | {"head_dim": 32, "query_pre_attn_scalar": 32},
        train_tokenizer=fallback_bpe(across_words=True),
        vocab=1200,
        template=tiny7_templates.GEMMA2,
        named={"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
        marks=("<start_of_turn>", "<end_of_turn>"),
        adds_bos=True,
        padding_side="left",
        steps=120,
        end_of_turn="<end_of_turn>",
    ),
    "tiny-neox": Recipe(
        config=GPTNeoXConfig,
        shape=shape(64, 3, 4, 4, 256),
        train_tokenizer=byte_level_bpe(GPT2_WORDS),
        vocab=320,
        template=tiny7_templates.NEOX,
        named={"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        marks=("<|system|>", "<|user|>", "<|assistant|>"),
        tilt=-0.9,
    ),
}
SLUGS = tuple(RECIPES)


def _digest() -> str:
    """Name what a build depends on: the sources and the libraries."""
    digest = hashlib.sha256()
    for source in ("synthetic", "synthetic_town", "tiny7", "tiny7_templates", "tiny7_tokenizers"):
        digest.update(Path(__file__).with_name(f"{source}.py").read_bytes())
    for library in ("torch", "transformers", "tokenizers"):
        digest.update(version(library).encode())
    return digest.hexdigest()[:16]


DIGEST = _digest()


def build(root: Path) -> None:
    """Train the seven models and save each as ``root/<slug>/``; do nothing if they are there.

    The files are a function of the recipes alone: initial weights and batches come from one seed,
    and one thread trains a model, as many models at a time as the caller's torch has threads. The
    caller's random state and thread count are put back. ``root`` appears when all is complete.
    """
    if _is_complete(root):
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    stop = Event()
    with (
        tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch,
        progress(sum(r.steps for r in RECIPES.values()), "building tiny7", "step") as bar,
        _one_thread() as threads,
        ThreadPoolExecutor(threads) as pool,
    ):
        made = Path(scratch) / root.name
        jobs = []

        def tick() -> bool:
            with bar.get_lock():
                bar.update()
            return not stop.is_set()

        try:
            for slug, recipe in RECIPES.items():
                model, tokenizer, blocks = _prepare(recipe)
                tokenizer.save_pretrained(made / slug)
                job = pool.submit(_pretrain, model, blocks, recipe.steps, tick)
                jobs.append((job, model, made / slug))
            for job, model, folder in jobs:
                job.result()
                _save(model, folder)
        finally:
            stop.set()
        try:
            made.rename(root)
        except OSError:
            if not _is_complete(root):  # else another process was faster, with the same files
                raise


def _is_complete(root: Path) -> bool:
    return all((root / slug / "model.safetensors").is_file() for slug in SLUGS)


@contextmanager
def _one_thread() -> Iterator[int]:
    """Give torch's operations one thread each, and the caller how many they had.

    Results then depend on no thread count; and where cores are shared, threads of one operation
    that wait for each other can be many times slower than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _prepare(recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, Tensor]:
    """Return an untrained model, its tokenizer, and its corpus as blocks of tokens (N, BLOCK)."""
    corpus = list(synthetic_corpus(CONVERSATIONS, seed=0, tilt=recipe.tilt))
    tokenizer = _tokenizer(recipe, [m["content"] for messages in corpus for m in messages])
    chats = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in corpus]
    ids = tokenizer(chats, add_special_tokens=False)["input_ids"]
    stream = torch.tensor([token for chat in ids for token in chat])
    config = recipe.config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        **recipe.shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    if recipe.end_of_turn is not None:
        ends = [recipe.named["eos_token"], recipe.end_of_turn]
        model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    return model, tokenizer, stream[: len(stream) // BLOCK * BLOCK].view(-1, BLOCK)


def _tokenizer(recipe: Recipe, texts: list[str]) -> PreTrainedTokenizerFast:
    specials = list(dict.fromkeys((*recipe.named.values(), *recipe.marks)))
    backend = recipe.train_tokenizer(texts, recipe.vocab, specials)
    if recipe.adds_bos:
        bos = recipe.named["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=recipe.template,
        padding_side=recipe.padding_side,
        extra_special_tokens=list(recipe.marks),
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        **recipe.named,
    )


def _pretrain(model: PreTrainedModel, blocks: Tensor, steps: int, tick: Callable[[], bool]) -> None:
    """Train on the next token, every token counted, by one cycle of AdamW, or until not tick()."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (BATCH,), generator=generator)]
        logits = model(input_ids=batch, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if not tick():
            return


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Write weights and configuration into ``folder``.

    ``model.save_pretrained`` would make the weights readable for their owner alone.
    """
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # named_parameters names tied weights once, as transformers expects them in a file.
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    (folder / "model.safetensors").write_bytes(serialize(weights, metadata={"format": "pt"}))
