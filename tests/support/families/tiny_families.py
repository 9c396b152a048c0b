"""A tiny random model of each family with a tokenizer of its kind, in the files that transformers writes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from backbones import WORDS, tiny_bert, tiny_roberta
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 320,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
END = "<|endoftext|>"


@dataclass(frozen=True)
class Tiny:
    """How a family's tiny model is written, and what is known of it.

    Attributes:
        write: writes model and tokenizer into a folder.
        both_ways: whether tokens attend to later ones in the family's use.
        family: ``backbone.family``.
        attention: names of the linear layers of attention in a layer.
        mlp: the same of the feed-forward network.
    """

    write: Callable[[Path], Path]
    both_ways: bool
    family: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]


def byte_level(special: list[str], template: str, **names: str) -> hf.PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer without merges, as Llama 3, Qwen, SmolLM and ModernBERT have."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, special, template, names)


def sentence_piece(special: list[str], template: str, blanks: str, **names: str) -> hf.PreTrainedTokenizerFast:
    """Make a BPE tokenizer over characters in the manner of SentencePiece.

    Blanks: ``always`` as XLM-R's, which begin a text with one; ``dummy`` as Llama 2's and Mistral's, which add one;
    ``kept`` as Gemma's.
    """
    characters = [*"▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789;:,.'()>&-!?/\n"]
    vocabulary = {token: index for index, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    if blanks == "always":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    elif blanks == "dummy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return _fast(tokenizer, special, template, names)


def _fast(
    tokenizer: Tokenizer, special: list[str], template: str, names: Mapping[str, str]
) -> hf.PreTrainedTokenizerFast:
    tokens = [(token, tokenizer.token_to_id(token)) for token in special]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)  # type: ignore[no-untyped-call]


def _write(make: Callable[[int], hf.PreTrainedModel], tokenizer: hf.PreTrainedTokenizerFast, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = make(len(tokenizer))
        for name, parameter in model.named_parameters():  # so that different texts get clearly different vectors
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name or "tok" in name else 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mpnet(folder: Path) -> Path:
    words = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", ";", ":", *WORDS, *"bcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {token: index for index, token in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "[UNK]"}
    fast = _fast(tokenizer, ["<s>", "</s>"], "<s> $A </s>", {**names, "mask_token": "<mask>", "cls_token": "<s>"})
    return _write(lambda size: hf.MPNetModel(hf.MPNetConfig(vocab_size=size, **SIZES)), fast, folder)


def xlm_roberta(folder: Path) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    fast = sentence_piece(["<s>", "<pad>", "</s>", "<unk>"], "<s> $A </s>", "always", **names)
    return _write(
        lambda size: hf.XLMRobertaModel(hf.XLMRobertaConfig(vocab_size=size, pad_token_id=1, **SIZES)), fast, folder
    )


def modernbert(folder: Path) -> Path:
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    fast = byte_level(["[PAD]", "[CLS]", "[SEP]", "[MASK]"], "[CLS] $A [SEP]", **names)
    more: dict[str, Any] = {
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    }
    more |= {"local_attention": 16, "global_attn_every_n_layers": 2}
    return _write(lambda size: hf.ModernBertModel(hf.ModernBertConfig(vocab_size=size, **SIZES, **more)), fast, folder)


def llama(folder: Path) -> Path:
    """Llama 3: byte-level BPE, a token at the beginning, none at the end, no padding."""
    fast = byte_level(["<s>", END], "<s> $A", bos_token="<s>", eos_token=END)
    config: dict[str, Any] = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    return _write(lambda size: hf.LlamaModel(hf.LlamaConfig(vocab_size=size, **SIZES, **config)), fast, folder)


def causal_llama(folder: Path, tied: bool = False) -> Path:
    """Llama 3 and SmolLM with the language-model head, its own or tied to the token embeddings."""
    fast = byte_level(["<s>", END], "<s> $A", bos_token="<s>", eos_token=END)
    config: dict[str, Any] = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    config["tie_word_embeddings"] = tied
    return _write(lambda size: hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=size, **SIZES, **config)), fast, folder)


def smollm(folder: Path) -> Path:
    """SmolLM2: byte-level BPE with single digits, no token at the beginning or the end; the end token pads."""
    fast = byte_level([END, "<|im_start|>", "<|im_end|>"], "$A", eos_token="<|im_end|>", pad_token="<|im_end|>")
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    config: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, **GROUPED}
    return _write(lambda size: hf.LlamaModel(hf.LlamaConfig(vocab_size=size, **SIZES, **config)), fast, folder)


def gemma(folder: Path) -> Path:
    """Gemma 3: SentencePiece without a dummy prefix, sliding windows in all layers but one."""
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    fast = sentence_piece(["<pad>", "<eos>", "<bos>", "<unk>"], "<bos> $A", "kept", **names)
    more: dict[str, Any] = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], **GROUPED}
    return _write(lambda size: hf.Gemma3TextModel(hf.Gemma3TextConfig(vocab_size=size, **SIZES, **more)), fast, folder)


def qwen3(folder: Path) -> Path:
    """Qwen3-Embedding: the tokenizer itself ends a text with the token that also pads."""
    fast = byte_level([END, "<|im_end|>"], f"$A {END}", eos_token="<|im_end|>", pad_token=END)
    more: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 0, **GROUPED}
    return _write(lambda size: hf.Qwen3Model(hf.Qwen3Config(vocab_size=size, **SIZES, **more)), fast, folder)


def mistral(folder: Path) -> Path:
    """E5-Mistral: SentencePiece with a dummy prefix; the token at the end is not the tokenizer's, and it pads, too."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    fast = sentence_piece(["<unk>", "<s>", "</s>"], "<s> $A", "dummy", **names)
    more: dict[str, Any] = {"sliding_window": None, **GROUPED}
    return _write(lambda size: hf.MistralModel(hf.MistralConfig(vocab_size=size, **SIZES, **more)), fast, folder)


def longformer(folder: Path, window: int = 64, **more: Any) -> Path:
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    fast = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], "<s> $A </s>", **names)
    config: dict[str, Any] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "attention_window": window}
    return _write(
        lambda size: hf.LongformerModel(
            hf.LongformerConfig(vocab_size=size, **SIZES, **config, **more), add_pooling_layer=False
        ),
        fast,
        folder,
    )


def recformer(folder: Path, prefix: str = "", stated: bool = True) -> Path:
    """RecFormer's checkpoint as its authors name tensors: a Longformer of four types, and a table of item positions.

    Args:
        folder: for the files.
        prefix: ``longformer.`` for the model with a head, which has further tensors.
        stated: False: the configuration is that of the Longformer it was started from.
    """
    longformer(folder, type_vocab_size=4)
    tensors = {f"{prefix}{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(5)
    tensors[f"{prefix}embeddings.item_position_embeddings.weight"] = torch.randn(51, 32, generator=draw) * 0.5
    if prefix:
        tensors["item_embedding.weight"] = torch.zeros(7, 32)
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(320)[None]  # a buffer of older transformers
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    own: dict[str, Any] = {"token_type_size": 4, "max_item_embeddings": 51, "max_token_num": 300}
    own |= {"max_attr_num": 2, "max_attr_length": 32, "architectures": ["RecformerForSeqRec"]}
    config |= {"type_vocab_size": 1, **(own if stated else {"attention_window": [512, 512]})}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


_BERT = ("query", "key", "value", "attention.output.dense"), ("intermediate.dense", "output.dense")
_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
TINY: Mapping[str, Tiny] = {
    "bert": Tiny(tiny_bert, True, "encoder", *_BERT),
    "blair": Tiny(tiny_roberta, True, "blair", *_BERT),
    "xlm-roberta": Tiny(xlm_roberta, True, "encoder", *_BERT),
    "mpnet": Tiny(mpnet, True, "encoder", ("attn.q", "attn.k", "attn.v", "attn.o"), _BERT[1]),
    "modernbert": Tiny(modernbert, True, "encoder", ("attn.Wqkv", "attn.Wo"), ("mlp.Wi", "mlp.Wo")),
    "llama": Tiny(llama, False, "decoder", *_DECODER),
    "smollm": Tiny(smollm, False, "decoder", *_DECODER),
    "gemma": Tiny(gemma, False, "decoder", *_DECODER),
    "qwen3-embedding": Tiny(qwen3, False, "qwen3-embedding", *_DECODER),
    "e5-mistral": Tiny(mistral, False, "e5-mistral", *_DECODER),
    "llm2vec": Tiny(llama, True, "llm2vec", *_DECODER),
}


def layout_of_linear(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Return name -> (out, in) of all linear layers."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: (module.out_features, module.in_features) for name, module in linear.items()}
