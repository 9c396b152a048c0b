"""Speed of encoding, as a share of the measured peak of bfloat16 matrix products.

    python benchmarks/speed/bench_encoding.py [--size 12x768] [--profile]

Alternatives: the transformers model called under autocast on batches of 64 in the order given, padded to the longest;
the same on batches sorted by length; and ``fedmerge.encoder.encode``. The model is a BERT built from a configuration,
with random weights, by default of MiniLM's size (6 layers of width 384). Token ids are random; lengths are those of a
shop: three items of 20 to 60 tokens for each user of 65 to 128 tokens.

Operations are counted on real tokens, never on padding, for a sequence of n tokens and each of the L layers of width d
and inner width f:  2 n (4 d² + 2 d f)  for the linear layers and  4 n² d  for attention. The peak is that of the two
feed-forward products, (8192 x d)·(d x f) and (8192 x f)·(f x d), without bias, timed in the same turns.
"""

import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from interleaved import arguments, print_table, timed_in_turn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import TOKENS_PER_BATCH, embed_batch, encode, length_batches
from fedmerge.encoder.text import SpecialTokens, Tokens

ROWS, PRODUCTS = 8192, 4
SIZES = {"6x384": (6, 384), "12x384": (12, 384), "12x768": (12, 768)}


def build_backbone(layers: int, width: int) -> Backbone:
    """Return a backbone with random weights and without a tokenizer."""
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * width
    )
    torch.manual_seed(0)
    model = BertModel(config, add_pooling_layer=False).train(False).requires_grad_(False)
    special = SpecialTokens(np.array([101], np.int32), np.array([102], np.int32), 0)
    compute = resolve_compute("cpu", "bfloat16")
    return Backbone(model, None, special, "mean", "from configuration", "", compute)  # type: ignore[arg-type]  # see above


def shop_sequences(num_sequences: int) -> list[Tokens]:
    """Return random tokens with the lengths of a shop, in random order."""
    rng = np.random.default_rng(0)
    users = num_sequences // 4
    lengths = np.concatenate(
        [rng.integers(20, 61, num_sequences - users), np.minimum(128, rng.integers(65, 200, users))]
    )
    return [rng.integers(1000, 30000, length).astype(np.int32) for length in rng.permutation(lengths)]


def operations(backbone: Backbone, sequences: list[Tokens]) -> float:
    """Return the floating point operations on real tokens."""
    config = backbone.model.config
    n = np.array([len(sequence) for sequence in sequences], dtype=np.float64)
    d, f = config.hidden_size, config.intermediate_size
    return float(config.num_hidden_layers * (2 * n * (4 * d * d + 2 * d * f) + 4 * n * n * d).sum())


@torch.inference_mode()
def plain(backbone: Backbone, sequences: list[Tokens], batches: list[np.ndarray]) -> torch.Tensor:
    """Encode with the unchanged transformers model under autocast."""
    vectors = torch.empty(len(sequences), backbone.width)
    for batch in batches:
        vectors[torch.from_numpy(batch)] = embed_batch(backbone, [sequences[i] for i in batch])
    return vectors


def main() -> None:
    """Time the alternatives and the matrix products in turn; compare the vectors with those of float32."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--size", choices=SIZES, default="6x384", help="layers x width")
    parser.add_argument("--sequences", type=int, default=400)
    parser.add_argument("--profile", action="store_true", help="afterwards profile one call of each")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backbone = build_backbone(*SIZES[options.size])
    sequences = shop_sequences(options.sequences)
    lengths = [len(sequence) for sequence in sequences]
    as_given = np.array_split(np.arange(len(sequences)), max(1, len(sequences) // 64))
    by_length = length_batches(lengths, TOKENS_PER_BATCH)
    d, f = backbone.model.config.hidden_size, backbone.model.config.intermediate_size
    factors = {
        dtype: [torch.randn(ROWS, d), torch.randn(f, d), torch.randn(ROWS, f), torch.randn(d, f)]
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
    few = sequences[:60]
    exact = encode(replace(backbone, compute=resolve_compute("cpu", "float32")), few).double()
    for name, vectors in (
        ("transformers, autocast", plain(backbone, few, [np.arange(60)])),
        ("fedmerge", encode(backbone, few)),
    ):
        apart = 1 - (vectors.double() * exact).sum(dim=1)
        print(f"{name}: 1 − cosine to float32 is mean {apart.mean():.2e}, largest {apart.max():.2e}")
    for name, batches in (("64 as given", as_given), ("by length", by_length)):
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        print(f"padding, {name}: {100 * (padded / sum(lengths) - 1):.1f} % of the real tokens; fedmerge: none")
    both: dict[str, Callable[[], object]] = {
        "bfloat16": lambda: products("bfloat16", PRODUCTS),
        "float32": lambda: products("float32", 1),
    }
    seconds = timed_in_turn(calls | both, options.repeats, options.clock)
    once = 4 * ROWS * d * f
    peak = [PRODUCTS * once / each for each in seconds.pop("bfloat16")]
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
    for name, times in seconds.items():
        shares = [work / each / top for each, top in zip(times, peak, strict=True)]
        low, middle, high = statistics.quantiles(shares, n=4)
        rate = work / statistics.median(times) / 1e12
        print(f"{name}: {rate:.3f} TFLOP/s, {100 * middle:.0f} % of the peak ({100 * low:.0f} to {100 * high:.0f})")
    for name, call in calls.items() if options.profile else ():
        with profile(activities=[ProfilerActivity.CPU]) as record:
            call()
        print(f"\n{name}\n{record.key_averages().table(sort_by='self_cpu_time_total', row_limit=10)}")


if __name__ == "__main__":
    main()
