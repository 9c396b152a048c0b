"""CSFT of a client against transformers' own causal model, one user at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import tiny_bert
from tiny_families import causal_llama, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedmerge.adapter import adapter_sha256
from fedmerge.client.csft import csft_loss, next_titles
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import Batch, training_batches
from fedmerge.client.training.expert import train_expert, training_record
from fedmerge.client.training.round import RoundTask, train_round
from fedmerge.config import ExperimentConfig, Lora, Text, Train, from_flat
from fedmerge.config.model import BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone, load_backbone, open_backbone
from fedmerge.encoder.encode import tokens_at_once
from fedmerge.encoder.lora import attach, fresh_adapter
from fedmerge.errors import BackboneError, ConfigError
from fedmerge.llm2rec.titles import next_title_sequences, titles_of

CSFT = Train(
    objective="csft",
    learning_rate=1e-2,
    batch_size=10,
    max_steps=4,
    warmup_steps=1,
    validate_every_steps=2,
    validation_users=5,
)
LORA = Lora(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
SHORT = 60  # bytes are tokens here, so that most histories are cut


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two causal models, and a generated domain."""
    place = tmp_path_factory.mktemp("csft")
    demo = generate_domain("toys", num_users=20, num_items=20)
    titles = tuple("" if row % 5 == 0 else title for row, title in enumerate(demo.catalog.attributes["title"]))
    catalog = replace(demo.catalog, attributes={**demo.catalog.attributes, "title": titles})
    write_domain(place / "toys", catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    return {
        "own": causal_llama(place / "own"),
        "tied": causal_llama(place / "tied", tied=True),
        "toys": place / "toys",
    }


def opened(folders: dict[str, Path], model: str = "own", text: Text | None = None, **section: Any) -> LocalDomain:
    given = BackboneSection(source=str(folders[model]), **section)
    backbone = open_backbone(given, resolve_compute("cpu", "float32"))
    return open_domain(folders["toys"], backbone, text or Text(max_attribute_tokens=20, max_items=3, max_tokens=300))


def some_batch(domain: LocalDomain) -> Batch:
    return next(training_batches(domain.training_sequences, CSFT, 0, "toys"))[0]


def attributes(domain: LocalDomain) -> dict[str, tuple[str, ...]]:
    return dict(domain.catalog.attributes)


def loss_by_definition(domain: LocalDomain, batch: Batch, folder: Path) -> float:
    """Σ over users and tokens of −log p / number of target tokens, by transformers' loss with labels of −100."""
    # a byte is a token here, and one of 20 is the blank before the value
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cut = {name: [value[:19] for value in values] for name, values in attributes(domain).items()}
    whole = [" ".join(f"{name}: {value[row]}" for name, value in cut.items() if value[row]) for row in range(20)]
    titles = [title or text for title, text in zip(cut["title"], whole, strict=True)]
    total = number = 0.0
    for history, target in zip(batch.histories, batch.targets, strict=True):
        before = tokenizer(", ".join(titles[item] for item in history[-3:]), add_special_tokens=False)["input_ids"]
        after = [*tokenizer(f"{titles[target]}\n", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        room = domain.text.max_tokens - 1 - len(after)
        before = [tokenizer.bos_token_id, *before[max(0, len(before) - room) :]]
        labels = [-100] * len(before) + after
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([before + after]), labels=torch.tensor([labels])).loss
        total, number = total + float(loss) * len(after), number + len(after)
    return total / number


def loss_of(domain: LocalDomain, batch: Batch) -> torch.Tensor:
    return csft_loss(domain, next_titles(CSFT, domain)["toys"], batch)


@pytest.mark.parametrize("model", ["own", "tied"])
@pytest.mark.parametrize("attention", ["causal", "both-ways"])
@pytest.mark.parametrize("max_tokens", [300, SHORT])
def test_the_loss_is_that_of_transformers(
    folders: dict[str, Path], model: str, attention: str, max_tokens: int
) -> None:
    text = Text(max_attribute_tokens=20, max_items=3, max_tokens=max_tokens)
    domain = opened(folders, model, text, attention=attention)
    batch = some_batch(domain)
    assert any(item % 5 == 0 for item in batch.targets)  # without a title
    assert float(loss_of(domain, batch)) == pytest.approx(loss_by_definition(domain, batch, folders[model]), rel=1e-5)


@contextmanager
def final_states(backbone: Backbone) -> Iterator[list[torch.Tensor]]:
    """Collect the states that the head reads; their gradients are kept."""
    found: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, states: torch.Tensor) -> None:
        states.requires_grad_().retain_grad()
        found.append(states)

    model: Any = backbone.model
    hook = model.norm.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()


def test_tokens_of_the_history_have_no_loss_and_no_gradient(folders: dict[str, Path]) -> None:
    domain = opened(folders)
    batch = some_batch(domain)
    batch = Batch(batch.histories[:1], batch.targets[:1], batch.users[:1])
    with final_states(domain.backbone) as states:
        loss_of(domain, batch).backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
    (of_user,) = states
    assert of_user.grad is not None
    titles = titles_of(domain.catalog, domain.backbone.tokenizer, 20)
    length = len(f"{titles[batch.targets[0]]}\n".encode()) + 1
    has_gradient = of_user.grad[0].abs().sum(dim=1) > 0
    size = len(has_gradient)
    assert has_gradient.tolist() == [size - length - 1 <= place < size - 1 for place in range(size)]


@pytest.mark.parametrize("attention", ["causal", "both-ways"])
def test_parts_that_are_computed_again_have_the_same_gradient(folders: dict[str, Path], attention: str) -> None:
    domain = opened(folders, attention=attention)
    batch, found = some_batch(domain), []
    for limit in (None, 150):
        model = attach(domain.backbone, LORA.target_modules, 2, 4.0, seed=1)
        with tokens_at_once(limit):
            loss_of(domain, batch).backward()  # type: ignore[no-untyped-call]
        found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        model.unload()
    assert any(gradient is not None and gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-4)


def test_the_cut_is_on_the_left_and_keeps_the_target(folders: dict[str, Path]) -> None:
    backbone = opened(folders).backbone
    histories: Sequence[Sequence[str]] = [["red tent", "stove"], ["b"], ["a" * 90, "grinder"]]
    for max_tokens in (300, 20, 12):
        sequences, lengths = next_title_sequences(backbone, histories, ["a bag", "tent", "toy"], max_tokens)
        for sequence, length, history, target in zip(
            sequences, lengths, histories, ("a bag", "tent", "toy"), strict=True
        ):
            assert len(sequence) <= max_tokens
            assert sequence[0] == backbone.tokenizer.bos_token_id
            assert sequence[-1] == backbone.tokenizer.eos_token_id
            assert backbone.tokenizer.decode(sequence[-length:-1]) == f"{target}\n"
            before = str(backbone.tokenizer.decode(sequence[1:-length]))
            assert before
            assert ", ".join(history).endswith(before)
    (sequence,), (length,) = next_title_sequences(backbone, [["red tent"]], ["a" * 50], 20)
    assert (len(sequence), length) == (20, 18)  # one token is left of the history
    assert backbone.tokenizer.decode(sequence[1:2]) == "t"


# Trainings


def test_a_killed_training_resumes_to_the_same_bytes(folders: dict[str, Path], tmp_path: Path) -> None:
    domain = opened(folders, attention="both-ways")
    whole, report = train_expert(domain, LORA, CSFT, 0)
    assert [validation.step for validation in report.validations] == [0, 2, 4]

    def stop(line: str) -> None:
        if "step 4," in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_expert(domain, LORA, CSFT, 0, stop, tmp_path / "checkpoint")
    steps: list[str] = []
    resumed, again = train_expert(domain, LORA, CSFT, 0, steps.append, tmp_path / "checkpoint")
    assert "resuming at step 2" in steps[0]
    assert adapter_sha256(resumed) == adapter_sha256(whole)
    assert again.validations[1:] == report.validations[1:]


def test_a_round_lowers_the_loss(folders: dict[str, Path]) -> None:
    domain = opened(folders)
    settings = CSFT.model_copy(update={"learning_rate": 0.05})
    start = fresh_adapter(domain.backbone, LORA, 0)
    losses = []
    for steps in (2, 30):
        task = RoundTask(1, 1, start)
        losses.append(train_round(domain, LORA, settings.model_copy(update={"max_steps": steps}), 0, task)[1].loss)
    assert losses[0] is not None
    assert losses[1] is not None
    assert losses[1] < losses[0]


# What is refused, and what stays as it was


def test_infonce_has_the_settings_and_the_cache_key_of_before() -> None:
    assert "objective" not in training_record(Train())
    assert Train().auxiliary_record() == {}
    assert training_record(CSFT)["objective"] == "csft, LLM2Rec-style (arXiv:2506.21579)"


def test_encoders_and_models_without_a_head_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    domain = opened(folders)
    compute = resolve_compute("cpu", "float32")
    bert = replace(domain, backbone=load_backbone(str(tiny_bert(tmp_path / "bert")), "mean", compute))
    with pytest.raises(BackboneError, match=r"train.objective = 'csft' predicts tokens.*type bert.*'infonce'"):
        train_expert(bert, LORA, CSFT, 0)
    bare = replace(domain, backbone=load_backbone(str(llama(tmp_path / "bare")), "last", compute))
    with pytest.raises(BackboneError, match=r"needs the language-model head, but .*bare holds no lm_head.weight"):
        train_expert(bare, LORA, CSFT, 0)
    endless = opened(folders)
    endless.backbone.tokenizer.eos_token = None
    with pytest.raises(BackboneError, match="no end-of-sequence token"):
        train_expert(endless, LORA, CSFT, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone.family": "blair"}, "csft.* predicts tokens, which backbone.family = 'blair' does not"),
        ({"train.negatives": "catalog"}, "csft.* has no negatives"),
        ({"dp.mode": "user", "dp.epsilon": 4.0, "dp.delta": 1e-6}, "dp.mode = 'user' with train.objective = 'csft'"),
        ({"train.objective": "next"}, "infonce.*csft"),
    ],
)
def test_contradictions_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat({"train.objective": "csft", **changes})


def test_noise_by_domain_is_allowed() -> None:
    config = from_flat({"train.objective": "csft", "dp.mode": "domain-local", "dp.epsilon": 4.0, "dp.delta": 1e-6})
    assert isinstance(config, ExperimentConfig)
    assert np.isfinite(config.train.learning_rate)
