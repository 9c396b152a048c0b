"""Many domains: learned merging with a sample of the domains a step, and groups of domains with a merge each.

    python benchmarks/merging/bench_many_domains.py
    python benchmarks/merging/bench_many_domains.py --cost 8 32 128 1000 --quality 8 32 128 --repeats 5 --seeds 3

Cost: CPU seconds of a step of ``learn_coefficients`` with m sampled domains, whose adapters are read from safetensors,
and with all K in memory, in turn; and the bytes of factors and merge that each holds. The backbone is small (4 layers,
width 128), the adapters have rank 4 on query and value, a batch is 16 pseudo-users.

Quality: synthetic federations of K experts s_k (S + P_k): a shared update S, a private one P_k half as long, and a
length s_k that is 0.5 for one half of the domains and 2 for the other. The loss is ``kd`` on histories that learning
did not see, after the same number of steps, and after as many steps for each coefficient (K / m times as many). The
gain is the part of the way from the initial coefficients to those that all domains learned together.

Groups: federations whose domains belong to 1, 2 or 4 groups. The users of a domain want what the update of its group
ranks first; its expert is that update plus a private one as long. The server divides the domains by their adapters,
averages within 1, 2, 3, 4 or 6 groups, and chooses the number on NDCG@10 of validation users.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

from fedmerge.adapter import Adapter, LoraModule, OnDemand
from fedmerge.config import from_flat
from fedmerge.device import resolve_compute
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied
from fedmerge.encoder.text import SpecialTokens, Tokens
from fedmerge.evaluation.ranks import SELECTION_METRIC, per_user_metrics
from fedmerge.evaluation.sums import MetricSums, metric_sums
from fedmerge.mergerec.learn import learn_coefficients
from fedmerge.mergerec.objective import MergeRecSettings, batch_terms, weighted_total
from fedmerge.mergerec.pseudo_users import PseudoDomain
from fedmerge.mergerec.vectors import StreamedVectors, Vectors, merge_vectors
from fedmerge.merging.candidate import Candidate, Origin
from fedmerge.merging.stack import stack_adapters, survey_adapters
from fedmerge.server.candidates import merge_candidates, recipe_of
from fedmerge.server.groups import choose_grouping, groupings, rows_of

RANK, VOCABULARY = 4, 400


def build_backbone(width: int, layers: int, seed: int) -> Backbone:
    """Return a small BERT with random weights and without a tokenizer."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * width,
    )
    model = BertModel(config, add_pooling_layer=False).train(False).requires_grad_(False)
    special = SpecialTokens(np.array([1], np.int32), np.array([2], np.int32), 0)
    compute = resolve_compute("cpu", "float32")
    return Backbone(model, None, special, "mean", "small", "", compute)  # type: ignore[arg-type]  # see above


def random_update(backbone: Backbone, rng: torch.Generator, length: float) -> dict[str, tuple[torch.Tensor, ...]]:
    """Return random factors on query and value; Δ has entries of about length / √width."""
    width = backbone.width
    names = [name for name, _ in backbone.model.named_modules() if name.endswith(("query", "value"))]
    scales = (1 / width**0.5, length / RANK**0.5)
    return {
        name: (
            scales[0] * torch.randn(RANK, width, generator=rng),
            scales[1] * torch.randn(width, RANK, generator=rng),
        )
        for name in names
    }


def experts_of(backbone: Backbone, num_domains: int, seed: int) -> dict[str, Adapter]:
    """Return K experts s_k (S + P_k) of rank 8."""
    rng = torch.Generator().manual_seed(seed)
    shared = random_update(backbone, rng, 1.0)
    experts = {}
    for k in range(num_domains):
        private = random_update(backbone, rng, 0.5)
        experts[f"domain {k:04d}"] = Adapter(
            {
                name: LoraModule(torch.cat([A, private[name][0]]), torch.cat([B, private[name][1]], 1), (0.5, 2)[k % 2])
                for name, (A, B) in shared.items()
            }
        )
    return experts


def histories(rng: np.random.Generator, number: int, tokens: int) -> list[Tokens]:
    """Return token sequences of random words between the special tokens."""
    return [np.array([1, *rng.integers(3, VOCABULARY, tokens), 2], np.int32) for _ in range(number)]


def teach(
    backbone: Backbone, experts: Mapping[str, Adapter], items: int, seed: int
) -> tuple[dict[str, PseudoDomain], ...]:
    """Return every domain with one-item pseudo-users, and with as many longer histories that nothing learns from."""
    learned, held_out = {}, {}
    for k, name in enumerate(experts):
        rng = np.random.default_rng([seed, k])
        texts, longer = histories(rng, items, 6), histories(rng, items, 14)
        with applied(backbone, experts[name]):
            vectors, of_longer = encode(backbone, texts), encode(backbone, longer)
        learned[name] = PseudoDomain(name, texts, vectors, texts, vectors)
        held_out[name] = PseudoDomain(name, texts, vectors, longer, of_longer)
    return learned, held_out


def loss_of(
    backbone: Backbone,
    vectors: Vectors,
    coefficients: torch.Tensor,
    domains: Mapping[str, PseudoDomain],
    settings: MergeRecSettings,
) -> float:
    """Return the mean over domains of the loss of a merge."""
    losses = []
    with applied(backbone, merge_vectors(vectors, coefficients)):
        for domain in domains.values():
            students, users = encode(backbone, domain.items), encode(backbone, domain.users)
            drawn = np.zeros(len(users), np.int64)
            terms = batch_terms(users, domain.teacher_users, drawn, [domain.teacher_items], [students], settings)
            losses.append(float(weighted_total(terms, settings)))
    return statistics.fmean(losses)


def on_disk(experts: Mapping[str, Adapter], folder: Path) -> Mapping[str, Adapter]:
    """Write the experts to safetensors and return a mapping that reads them."""
    for name, expert in experts.items():
        factors = {f"{module}.A": each.lora_A for module, each in expert.modules.items()}
        save_file(
            factors | {f"{module}.B": each.lora_B for module, each in expert.modules.items()}, folder / f"{name}.st"
        )
    scalings = {
        name: {module: each.scaling for module, each in expert.modules.items()} for name, expert in experts.items()
    }

    def read(name: str) -> Adapter:
        found = load_file(folder / f"{name}.st")
        return Adapter(
            {
                module: LoraModule(found[f"{module}.A"], found[f"{module}.B"], scaling)
                for module, scaling in scalings[name].items()
            }
        )

    return OnDemand(experts, read)


def streamed(adapters: Mapping[str, Adapter]) -> StreamedVectors:
    """Return vectors that are read when they are needed."""
    layout = survey_adapters(adapters)
    return StreamedVectors(layout.domains, layout.groups, layout.group_of, adapters)


def step_seconds(
    backbone: Backbone, vectors: Vectors, domains: Mapping[str, PseudoDomain], settings: MergeRecSettings
) -> list[float]:
    """Return the CPU seconds of every step but the first."""
    ends: list[float] = []
    students = {name: domain.teacher_items for name, domain in domains.items()}
    learn_coefficients(
        backbone, vectors, domains, settings, lambda *_: ends.append(time.process_time()), students=students
    )
    return list(np.diff(ends))


def show_cost(options: argparse.Namespace) -> None:
    """Print the CPU seconds and the bytes of a step for every K."""
    backbone = build_backbone(options.width, options.layers, 0)
    sampled = MergeRecSettings(steps=options.timed_steps + 1, domains_per_step=options.sample)
    times: dict[tuple[int, str], list[float]] = {}
    held: dict[tuple[int, str], int] = {}
    for _ in range(options.repeats):
        for k in options.cost:
            with tempfile.TemporaryDirectory() as folder:
                experts = on_disk(experts_of(backbone, k, 0), Path(folder))
                rng = np.random.default_rng(0)
                domains = {}
                for name in experts:
                    texts = histories(rng, 8, 30)
                    vectors = torch.nn.functional.normalize(torch.randn(8, backbone.width), dim=1)
                    domains[name] = PseudoDomain(name, texts, vectors, texts, vectors)
                stack, few = stack_adapters(experts), streamed(experts)
                times.setdefault((k, "all"), []).extend(
                    step_seconds(backbone, stack, domains, replace(sampled, domains_per_step=None))
                )
                bytes_of_all = sum(each.lora_A.nbytes + each.lora_B.nbytes for each in stack.modules.values())
                held[k, "all"] = bytes_of_all
                if k > options.sample:
                    times.setdefault((k, "sampled"), []).extend(step_seconds(backbone, few, domains, sampled))
                    merge = sum(8 * len(each.lora_B) * each.lora_A.shape[1] for each in stack.modules.values())
                    held[k, "sampled"] = merge + bytes_of_all * options.sample // k
    print(f"\n{'K':>6}  {'domains a step':<16}{'CPU ms':>8}{'quartiles':>18}{'ratio to first':>16}{'MiB held':>10}")
    for (k, what), seconds in sorted(times.items(), key=lambda entry: (entry[0][1], entry[0][0])):
        first = next(statistics.median(each) for (_, other), each in sorted(times.items()) if other == what)
        low, middle, high = (1000 * value for value in statistics.quantiles(seconds, n=4))
        shown = "all" if what == "all" else str(options.sample)
        line = f"{k:>6}  {shown:<16}{middle:>8.1f}{f'{low:.1f} to {high:.1f}':>18}{middle / 1000 / first:>16.2f}"
        print(f"{line}{held[k, what] / 2**20:>10.2f}")


def show_quality(options: argparse.Namespace) -> None:
    """Print the loss on unseen histories for every K."""
    print(f"\n{'K':>6}  {'learned':<26}{'loss':>8}{'gain':>8}{'range of gain':>18}{'CPU s':>8}")
    for k in options.quality:
        found: dict[str, list[tuple[float, float, float]]] = {}  # loss, gain, seconds of every seed
        for seed in range(options.seeds):
            backbone = build_backbone(32, 2, seed)
            experts = experts_of(backbone, k, seed)
            learned, held_out = teach(backbone, experts, options.items, seed)
            full = MergeRecSettings(steps=options.steps, seed=seed)
            few = replace(full, domains_per_step=options.sample)
            many = replace(few, steps=-(-options.steps * k // options.sample))
            variants = {"initial": replace(full, steps=1), "all": full}
            if k > options.sample:
                variants |= {f"{options.sample} a step": few, f"{options.sample} a step, K/m steps": many}
            losses, seconds = {}, {}
            for name, settings in variants.items():
                vectors = streamed(experts) if settings.samples(k) else stack_adapters(experts)
                start = time.process_time()
                result = learn_coefficients(backbone, vectors, learned, settings)
                seconds[name] = time.process_time() - start
                values = result.initial_coefficients if name == "initial" else result.coefficients
                losses[name] = loss_of(backbone, vectors, values, held_out, full)
            way = losses["initial"] - losses["all"]
            for name, loss in losses.items():
                found.setdefault(name, []).append((loss, (losses["initial"] - loss) / way, seconds[name]))
        for name, rows in found.items():
            loss, gain, cpu = (statistics.median(column) for column in zip(*rows, strict=True))
            gains = [row[1] for row in rows]
            spread = f"{min(gains):.2f} to {max(gains):.2f}"
            print(f"{k:>6}  {name:<26}{loss:>8.3f}{gain:>8.2f}{spread:>18}{cpu:>8.1f}")


def federation_in_groups(
    backbone: Backbone, num_domains: int, num_groups: int, seed: int
) -> tuple[dict[str, Adapter], dict[str, Adapter]]:
    """Return experts G_g + P_k of rank 8, and the updates G_g that their users follow; domain k is in group k mod g."""
    rng = torch.Generator().manual_seed(seed)
    shared = [random_update(backbone, rng, 1.0) for _ in range(num_groups)]
    experts, truths = {}, {}
    for k in range(num_domains):
        private, group = random_update(backbone, rng, 1.0), shared[k % num_groups]
        truths[f"domain {k:02d}"] = Adapter({name: LoraModule(A, B, 1.0) for name, (A, B) in group.items()})
        experts[f"domain {k:02d}"] = Adapter(
            {
                name: LoraModule(torch.cat([A, private[name][0]]), torch.cat([B, private[name][1]], 1), 1.0)
                for name, (A, B) in group.items()
            }
        )
    return experts, truths


def choice_of_groups(
    backbone: Backbone,
    experts: Mapping[str, Adapter],
    truths: Mapping[str, Adapter],
    numbers: Sequence[int],
    seed: int,
    users: int = 60,
) -> tuple[dict[str, Any], dict[str, MetricSums]]:
    """Return the server's choice between one merge and merges of groups, and the validation sums behind it."""
    origin = Origin(dict.fromkeys(experts, ""), None, "adapter")
    recipe = recipe_of(from_flat({"merge.methods": "average"}))

    def merge(group: tuple[str, ...]) -> list[Candidate]:
        variants = recipe.variants([name for name in experts if name not in group])
        return merge_candidates({name: experts[name] for name in group}, variants, origin, recipe)

    found, one = groupings(experts, numbers, merge), merge(tuple(experts))[0]
    sums = {}
    for k, name in enumerate(experts):
        rng = np.random.default_rng([seed, k])
        items, people = histories(rng, 50, 6), histories(rng, users, 10)
        with applied(backbone, truths[name]):
            targets = (encode(backbone, people) @ encode(backbone, items).T).argmax(dim=1)
        outcomes = {}
        for row, adapter in {one.label: one.adapter, **rows_of(found).get(name, {})}.items():
            with applied(backbone, adapter):
                scores = encode(backbone, people) @ encode(backbone, items).T
            ranks = (scores > scores.gather(1, targets[:, None])).sum(dim=1) + 1
            outcomes[row] = per_user_metrics(ranks.numpy())
        sums[name] = metric_sums(outcomes, "unmasked")
    entry = choose_grouping(found, sums, one.label, SELECTION_METRIC)
    return entry or {}, sums


def show_groups(options: argparse.Namespace) -> None:
    """Print the number of groups that is chosen, and what it is worth, for known structures."""
    print(f"\n{'true groups':>12}{'chosen, by seed':>26}{'divided right':>15}{'NDCG@10 one merge':>19}{'chosen':>8}")
    for true in options.groups:
        chosen, right, scores = [], 0, []
        for seed in range(options.group_seeds):
            backbone = build_backbone(32, 2, seed)
            experts, truths = federation_in_groups(backbone, options.group_domains, true, seed)
            entry, _ = choice_of_groups(backbone, experts, truths, (2, 3, 4, 6), seed)
            chosen.append(entry["number"])
            names = sorted(experts)
            expected = sorted([names[group::true] for group in range(true)])
            right += sorted(entry.get("groups", [names])) == expected
            scores.append((entry["one_merge"], entry["scores"].get(entry.get("label"), entry["one_merge"])))
        one, best = (statistics.median(column) for column in zip(*scores, strict=True))
        shown = " ".join(map(str, chosen))
        print(f"{true:>12}{shown:>26}{f'{right} of {len(chosen)}':>15}{one:>19.4f}{best:>8.4f}")


def main() -> None:
    """Measure and print three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", type=int, nargs="*", default=[8, 32, 128])
    parser.add_argument("--quality", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--groups", type=int, nargs="*", default=[1, 2, 4], help="true numbers of groups")
    parser.add_argument("--group-domains", type=int, default=12)
    parser.add_argument("--group-seeds", type=int, default=3)
    parser.add_argument("--sample", type=int, default=4, help="domains a step")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timed-steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--items", type=int, default=16, help="items of a domain, for the quality")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{options.sample} domains a step; cost: {options.repeats} x {options.timed_steps} steps, width {options.width}"
    )
    show_cost(options)
    show_quality(options)
    show_groups(options)


if __name__ == "__main__":
    main()
