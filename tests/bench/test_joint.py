"""Joint training: pooled batches, their order, budgets, and that only the benchmark imports the code."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from fedmerge.adapter import adapter_sha256
from fedmerge.bench.config import Drawing
from fedmerge.bench.joint import joint_batches, pooled_settings, train_jointly
from fedmerge.client.local_domain import LocalDomain, open_domain
from fedmerge.client.training.batches import training_batches
from fedmerge.config import Lora, Text, Train
from fedmerge.domain.demo import generate_domain
from fedmerge.domain.folder import write_domain
from fedmerge.encoder.backbone import Backbone
from fedmerge.errors import ClientError, DomainError

USERS = {"books": 43, "coffee": 20, "toys": 12}  # in batches of five: 9, 4 and 3
LORA = Lora(rank=2, alpha=4, target_modules=("query",))
TRAIN = Train(
    learning_rate=0.03, batch_size=5, max_steps=2, warmup_steps=1, validate_every_steps=1, validation_users=None
)


@pytest.fixture(scope="module")
def domains(backbone: Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LocalDomain]:
    root = tmp_path_factory.mktemp("domains")
    for name, num_users in USERS.items():
        demo = generate_domain(name, num_users=num_users, num_items=25)
        write_domain(root / name, demo.catalog, demo.interactions, public_catalog=True, synthetic=True, source="test")
    text = Text(max_attribute_tokens=6, max_items=2, max_tokens=32)
    return {name: open_domain(root / name, backbone, text) for name in USERS}


def test_shuffled_weights_users_equally_and_balanced_weights_domains_equally(domains: dict[str, LocalDomain]) -> None:
    drawn: dict[Drawing, list[str]] = {}
    orders: tuple[Drawing, ...] = ("shuffled", "balanced")
    for drawing in orders:
        batches = list(itertools.islice(joint_batches(domains, TRAIN, 0, drawing), 32))
        drawn[drawing] = [domain.manifest.name for domain, _, _ in batches]
        assert [epochs for _, _, epochs in batches] == [number / 16 for number in range(1, 33)]
        for name, domain in domains.items():  # each domain's batches equal those of its expert, in the same order
            found = [batch for of, batch, _ in batches if of is domain]
            own = training_batches(domain.training_sequences, TRAIN, 0, name)
            for batch, (expected, _) in zip(found, own, strict=False):
                assert batch.targets.tolist() == expected.targets.tolist()
                assert [h.tolist() for h in batch.histories] == [h.tolist() for h in expected.histories]
    for epoch in (drawn["shuffled"][:16], drawn["shuffled"][16:]):
        assert Counter(epoch) == {"books": 9, "coffee": 4, "toys": 3}
    assert drawn["shuffled"][:16] != drawn["shuffled"][16:]
    for number in range(9):
        assert sorted(drawn["balanced"][3 * number : 3 * number + 3]) == ["books", "coffee", "toys"]
    assert len({tuple(drawn["balanced"][3 * number : 3 * number + 3]) for number in range(9)}) > 1


def test_the_budget_is_the_sum_of_all_experts_budgets() -> None:
    settings = Train(max_steps=100, max_minutes=2.5, max_epochs=3, validate_every_steps=20, warmup_steps=7)
    pooled = pooled_settings(settings, 3)
    assert (pooled.max_steps, pooled.max_minutes, pooled.max_epochs) == (300, 7.5, 3)
    assert (pooled.validate_every_steps, pooled.warmup_steps) == (60, 7)
    unlimited = pooled_settings(settings.model_copy(update={"max_steps": None, "max_minutes": None}), 3)
    assert (unlimited.max_steps, unlimited.max_minutes) == (None, None)


def test_an_interrupted_joint_training_resumes_to_the_same_result(
    domains: dict[str, LocalDomain], tmp_path: Path
) -> None:
    class Killed(BaseException):
        pass

    def kill(line: str) -> None:
        if "step 6" in line:
            raise Killed

    whole, report = train_jointly(domains, LORA, TRAIN, 3, "shuffled")
    assert (report.steps, report.stopped_by, len(report.validations)) == (6, "max_steps", 3)
    assert report.validation_users == sum(USERS.values())
    with pytest.raises(Killed):
        train_jointly(domains, LORA, TRAIN, 3, "shuffled", kill, tmp_path / "checkpoint")
    lines: list[str] = []
    again, report_again = train_jointly(domains, LORA, TRAIN, 3, "shuffled", lines.append, tmp_path / "checkpoint")
    assert lines[0] == "joint training, shuffled: resuming at step 3"
    assert adapter_sha256(again) == adapter_sha256(whole)
    assert report_again.validations[1:] == report.validations[1:]
    assert math.isnan(report_again.validations[0].loss)
    assert adapter_sha256(train_jointly(domains, LORA, TRAIN, 3, "balanced")[0]) != adapter_sha256(whole)


def test_a_domain_without_training_data_and_a_diverging_loss_are_errors(domains: dict[str, LocalDomain]) -> None:
    everywhere = LORA.model_copy(update={"target_modules": ("all-linear",)})
    with pytest.raises(ClientError, match=r"domain (books|coffee|toys): .*\bnan\b"):
        train_jointly(domains, everywhere, TRAIN.model_copy(update={"learning_rate": 1e30}), 0, "balanced")
    demo = generate_domain("toys", num_users=1, num_items=25)
    lonely = replace(domains["toys"], interactions=demo.interactions)
    with pytest.raises(DomainError, match=r"domain toys: 1 users"):
        train_jointly({**domains, "toys": lonely}, LORA, TRAIN, 0, "balanced")
