"""Tiny backbones built from a configuration: the real transformers classes, without a download."""

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

WORDS = [
    "title",
    "brand",
    "category",
    "tent",
    "sleeping",
    "bag",
    "stove",
    "coffee",
    "grinder",
    "toy",
    "car",
    "doll",
    "puzzle",
    "shampoo",
    "soap",
    "brush",
    "red",
    "blue",
    "green",
    "steel",
    "wooden",
    "organic",
    "kids",
    "small",
    "large",
    "pack",
    "of",
    "for",
    "and",
    "with",
    "the",
    "a",
]


def tiny_bert(folder: Path, seed: int = 0) -> Path:
    """Write a two-layer BERT of width 32 with a WordPiece vocabulary of whole words and letters."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ";", ":", *WORDS]
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens += [letter for letter in letters if letter not in tokens] + [f"##{letter}" for letter in letters]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # of transformers
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return _written(lambda: BertModel(config, add_pooling_layer=False), fast, folder, seed)


def tiny_roberta(folder: Path, seed: int = 0) -> Path:
    """Write a two-layer RoBERTa of width 32 with byte-level BPE."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # of transformers
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        cls_token="<s>",
        sep_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
    )
    config = RobertaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=258,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        type_vocab_size=1,
    )
    return _written(lambda: RobertaModel(config, add_pooling_layer=False), fast, folder, seed)


def _written(build: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, folder: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build()
        _spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spread(model: torch.nn.Module) -> None:
    """Scale the weights up, so that different texts get clearly different vectors."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embeddings" not in name:
            torch.nn.init.xavier_uniform_(parameter)
        elif "word_embeddings" in name:
            torch.nn.init.normal_(parameter, std=0.5)


def bert_for_peft() -> PreTrainedModel:
    """Return a tiny BERT, without a tokenizer."""
    config = BertConfig(vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertModel(config, add_pooling_layer=False)


def llama_config() -> LlamaConfig:
    """Return the configuration of a tiny Llama with grouped-query attention."""
    return LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )
