"""Speed of encoding, as a share of the measured peak of bfloat16 matrix products.

    python benchmarks/speed/bench_encoding.py [--size 12x768 | --source all-MiniLM-L6-v2] [--device cuda] [--profile]

Alternatives: the transformers model called under autocast on batches of 64 in the order given, padded to the longest;
the same on batches sorted by length; and ``fedmerge.encoder.encode``; and on quantised weights this and the model
called on batches sorted by length, as in training. The model is a BERT built from a configuration,
with random weights, by default of MiniLM's size (6 layers of width 384). Token ids are random; lengths are those of a
shop: three items of 20 to 60 tokens for each user of 65 to 128 tokens.

Operations are counted on real tokens, never on padding, for a sequence of n tokens: 2 n for each weight of the linear
layers, and 4 n² d for attention in each layer of width d. The peak is that of the two
feed-forward products, (8192 x d)·(d x f) and (8192 x f)·(f x d), without bias, timed in the same turns.
"""

import copy
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from interleaved import Seconds, arguments, print_table, timed_in_turn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from fedmerge.device import Compute, resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.encoder.backbone import Backbone, load_backbone
from fedmerge.encoder.encode import GPU_TOKENS_PER_BATCH, TOKENS_PER_BATCH, embed_batch, encode, length_batches
from fedmerge.encoder.loading.quantised import Kind, quantise
from fedmerge.encoder.text import SpecialTokens, Tokens, build_token_table, item_sequences

KINDS: list[Kind] = ["int8", *(["nf4"] if importlib.util.find_spec("bitsandbytes") else [])]  # type: ignore[list-item]
ROWS = 8192
PRODUCTS = {"cpu": 4, "cuda": 1000}  # in a turn; on a GPU for longer than they take to start
SIZES = {"6x384": (6, 384), "12x384": (12, 384), "12x768": (12, 768)}


def build_backbone(layers: int, width: int, compute: Compute) -> Backbone:
    """Return a backbone with random weights and without a tokenizer."""
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * width
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).train(False).requires_grad_(False)
    special = SpecialTokens(np.array([101], np.int32), np.array([102], np.int32), 0)
    model.to(compute.device)
    return Backbone(model, None, special, "mean", "from configuration", "", compute)  # type: ignore[arg-type]  # see above


def shop_sequences(num_sequences: int) -> list[Tokens]:
    """Return random tokens with the lengths of a shop, in random order."""
    rng = np.random.default_rng(0)
    users = num_sequences // 4
    lengths = np.concatenate(
        [rng.integers(20, 61, num_sequences - users), np.minimum(128, rng.integers(65, 200, users))]
    )
    return [rng.integers(1000, 30000, length).astype(np.int32) for length in rng.permutation(lengths)]


def item_texts(backbone: Backbone, number: int) -> list[Tokens]:
    """Return texts of demo items; of a model without a tokenizer random tokens."""
    if backbone.tokenizer is None:
        return shop_sequences(number)
    catalog = generate_domain("books").catalog
    table = build_token_table(catalog, backbone.tokenizer, 32, backbone.special.attributes)
    return item_sequences(table, backbone.special, 128)[:number]


def quantised(backbone: Backbone, kind: Kind) -> Backbone:
    """Return a copy with quantised weights."""
    model = copy.deepcopy(backbone.model)
    quantise(model, kind)
    return replace(backbone, model=model, quantisation=kind)


def megabytes(model: torch.nn.Module) -> float:
    """Return the size of a model's weights, codes and scales."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [state.absmax for layer in model.modules() if (state := getattr(layer, "state", None)) is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def operations(backbone: Backbone, sequences: list[Tokens]) -> float:
    """Return the floating point operations on real tokens."""
    config = backbone.model.config
    n = np.array([len(sequence) for sequence in sequences], dtype=np.float64)
    weights = sum(
        module.weight.numel()
        for name, module in backbone.model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layer" in name
    )
    return float((2 * n * weights + config.num_hidden_layers * 4 * n * n * config.hidden_size).sum())


@torch.inference_mode()
def plain(backbone: Backbone, sequences: list[Tokens], batches: list[np.ndarray]) -> torch.Tensor:
    """Encode with the unchanged transformers model under autocast."""
    vectors = torch.empty(len(sequences), backbone.width)
    for batch in batches:
        vectors[torch.from_numpy(batch)] = embed_batch(backbone, [sequences[i] for i in batch], varlen=False).cpu()
    return vectors


def print_quantised(backbone: Backbone, variants: dict[Kind, Backbone], few: list[Tokens], exact: torch.Tensor) -> None:
    """Print the size of each variant's weights, and how far its vectors are from those of full precision (n, d)."""
    linear = sum(2 * layer.weight.numel() for layer in backbone.model.modules() if isinstance(layer, torch.nn.Linear))
    print(f"weights: {megabytes(backbone.model):.1f} MB, while fedmerge encodes {linear / 1e6:.1f} MB more in bfloat16")
    in_float32 = resolve_compute(str(backbone.device), "float32")
    for kind, variant in variants.items():
        vectors = encode(replace(variant, compute=in_float32), few).double()
        apart = 1 - (vectors * exact).sum(dim=1)
        print(
            f"{kind}: weights {megabytes(variant.model):.1f} MB; in float32, 1 − cosine to full precision is mean "
            f"{apart.mean():.2e}, largest {apart.max():.2e}"
        )


def print_shares(seconds: Seconds, peak: list[float], work: float) -> None:
    """Print the operations a second of each alternative, and their share of the peak of the same turn."""
    for name, times in seconds.items():
        shares = [work / each / top for each, top in zip(times, peak, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        rate = work / statistics.median(times) / 1e12
        print(f"{name}: {rate:.3f} TFLOP/s, {100 * middle:.0f} % of the peak ({100 * low:.0f} to {100 * high:.0f})")


def main() -> None:
    """Time the alternatives and the matrix products in turn; compare the vectors with those of float32."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--size", choices=SIZES, default="6x384", help="layers x width")
    parser.add_argument("--source", help="a real model in place of random weights: as backbone.source")
    parser.add_argument("--sequences", type=int, default=400, help="more on a GPU, say 20000")
    parser.add_argument("--device", choices=PRODUCTS, default="cpu")
    parser.add_argument("--profile", action="store_true", help="afterwards profile one call of each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    compute = resolve_compute(options.device, "bfloat16")
    if options.source:
        backbone = load_backbone(options.source, "auto", compute)
    else:
        backbone = build_backbone(*SIZES[options.size], compute)
    sequences = shop_sequences(options.sequences)
    lengths = [len(sequence) for sequence in sequences]
    as_given = np.array_split(np.arange(len(sequences)), max(1, len(sequences) // 64))
    at_once = TOKENS_PER_BATCH if options.device == "cpu" else GPU_TOKENS_PER_BATCH
    by_length = length_batches(lengths, at_once)
    d, f = backbone.model.config.hidden_size, backbone.model.config.intermediate_size
    factors = {
        dtype: [torch.randn(*shape, device=compute.device) for shape in ((ROWS, d), (f, d), (ROWS, f), (d, f))]
        for dtype in ("bfloat16", "float32")
    }
    factors["bfloat16"] = [factor.bfloat16() for factor in factors["bfloat16"]]

    def products(dtype: str, number: int) -> None:
        narrow, up, wide, down = factors[dtype]
        for _ in range(number):
            torch.nn.functional.linear(narrow, up)
            torch.nn.functional.linear(wide, down)

    calls: dict[str, Callable[[], object]] = {
        "transformers, autocast, 64 as given": lambda: plain(backbone, sequences, as_given),
        "transformers, autocast, by length": lambda: plain(backbone, sequences, by_length),
        "fedmerge": lambda: encode(backbone, sequences),
    }
    variants = {kind: quantised(backbone, kind) for kind in KINDS}
    for kind, variant in variants.items():
        calls[f"fedmerge, {kind}"] = lambda variant=variant: encode(variant, sequences)  # type: ignore[misc]
        calls[f"transformers, autocast, by length, {kind}"] = (
            lambda variant=variant: plain(variant, sequences, by_length)  # type: ignore[misc]
        )
    few = item_texts(backbone, 60)
    exact = encode(replace(backbone, compute=resolve_compute(options.device, "float32")), few).double()
    for name, vectors in (
        ("transformers, autocast", plain(backbone, few, [np.arange(len(few))])),
        ("fedmerge", encode(backbone, few)),
    ):
        apart = 1 - (vectors.double() * exact).sum(dim=1)
        print(f"{name}: 1 − cosine to float32 is mean {apart.mean():.2e}, largest {apart.max():.2e}")
    print_quantised(backbone, variants, few, exact)
    for name, batches in (("64 as given", as_given), ("by length", by_length)):
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        print(f"padding, {name}: {100 * (padded / sum(lengths) - 1):.1f} % of the real tokens; fedmerge: none")
    both: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: products("bfloat16", PRODUCTS[options.device]),
        "float32": lambda: products("float32", 1),
    }
    seconds = timed_in_turn(calls | both, options.repeats, options.clock)
    once = 4 * ROWS * d * f
    peak = [PRODUCTS[options.device] * once / each for each in seconds.pop("bfloat16")]
    single = [once / each for each in seconds.pop("float32")]
    work = operations(backbone, sequences)
    print(
        f"\n{options.size}; {len(sequences)} sequences, {sum(lengths)} tokens, {options.threads} threads, "
        f"{options.clock} clock"
    )
    print(
        f"matrix products: bfloat16 {statistics.median(peak) / 1e12:.3f} TFLOP/s, "
        f"float32 {statistics.median(single) / 1e12:.3f}"
    )
    print_table(seconds, "transformers, autocast, 64 as given", "tokens/s", sum(lengths))
    print_shares(seconds, peak, work)
    for name, call in calls.items() if options.profile else ():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=10)}")


if __name__ == "__main__":
    main()
