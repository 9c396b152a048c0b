"""Training signals: sums of |⟨gradient, change⟩| over steps, resumed with a training, and the spread of users."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedmerge.adapter import adapter_sha256
from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.checkpoint import read_checkpoint, write_checkpoint
from fedmerge.client.training.expert import train_expert
from fedmerge.client.training.loop import Attached, Budget, Recipe, Schedule, Step, StepResult, fit
from fedmerge.client.training_signals import SignalSums, spread_of_users
from fedmerge.config import Lora, Train
from fedmerge.domain.interactions import make_interactions
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import applied, factors_of
from fedmerge.encoder.text import pack_sequences

LORA = Lora(rank=2, alpha=4, target_modules=("query", "value"))
Signals = Mapping[str, tuple[float, float]]
SHORT = Train(learning_rate=0.03, batch_size=10, max_steps=5, warmup_steps=1, validate_every_steps=2)


def trained_on_quadratics(backbone: Backbone, rate: float | None) -> tuple[Signals, Signals]:
    """Make three steps on Σ (factor - drawn)², by plain SGD with this rate or, without one, by AdamW.

    Returns:
        The signals of the loop; and by the definition in float64, for SGD as rate · Σ ‖g‖².
    """
    expected: dict[str, list[float]] = {}

    def init(attached: Attached, first: int) -> Step:
        factors = factors_of(attached.model)
        rng = torch.Generator().manual_seed(1)
        drawn = {name: [torch.randn(each.shape, generator=rng) for each in pair] for name, pair in factors.items()}

        def step(number: int) -> StepResult:
            attached.optimizer.zero_grad()
            for name, pair in factors.items():
                for factor, target in zip(pair, drawn[name], strict=True):
                    torch.autograd.backward(((factor - target) ** 2).sum())
            before = {name: [each.detach().double().clone() for each in pair] for name, pair in factors.items()}
            if rate is None:
                attached.optimizer.step()
            else:
                torch.optim.SGD(attached.parameters, lr=rate).step()
            for name, pair in factors.items():
                sums = expected.setdefault(name, [0.0, 0.0])
                for place, (factor, earlier) in enumerate(zip(pair, before[name], strict=True)):
                    gradient = torch.as_tensor(factor.grad).double()
                    change = earlier - factor.detach().double() if rate is None else rate * gradient
                    sums[place] += abs(float((gradient * change).sum()))
            return StepResult(0.0)

        return step

    schedule = Schedule(learning_rate=0.05, warmup_steps=1, budget=Budget(max_steps=3))
    trained = fit(Recipe("quadratics", init, schedule), backbone, LORA, 0)
    assert trained.signals is not None
    return trained.signals, {name: (pair[0], pair[1]) for name, pair in expected.items()}


@pytest.mark.parametrize("rate", [0.1, None], ids=["plain SGD: rate · Σ ‖g‖²", "AdamW"])
def test_signals_are_sums_of_gradient_times_change(backbone: Backbone, rate: float | None) -> None:
    found, expected = trained_on_quadratics(backbone, rate)
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair, rel=1e-4)
        assert min(found[name]) > 0


def test_a_step_without_gradient_adds_nothing() -> None:
    factors = {"m": (torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4, 2)))}
    sums = SignalSums(factors)
    with sums.measured():
        pass
    assert sums.of_modules() == {"m": (0.0, 0.0)}
    factors["m"][0].grad = torch.full((2, 3), torch.nan)
    with sums.measured():
        pass
    assert sums.of_modules() is None  # never a number that is not one


def test_a_training_reports_its_signals(toys: LocalDomain) -> None:
    adapter, report = train_expert(toys, LORA, SHORT, 3)
    assert report.signals is not None
    assert report.signals.keys() == adapter.modules.keys()
    values = np.array(list(report.signals.values()))
    assert (values > 0).all()
    assert (values == values.astype(np.float32)).all()  # so that a message changes nothing


class Killed(BaseException):
    """A stop that no handler catches."""


def interrupted(toys: LocalDomain, checkpoint: Path) -> None:
    def progress(line: str) -> None:
        if "step 4," in line:
            raise Killed

    with pytest.raises(Killed):
        train_expert(toys, LORA, SHORT, 3, progress, checkpoint)


def test_a_resumed_training_has_the_same_signals(toys: LocalDomain, tmp_path: Path) -> None:
    whole, report = train_expert(toys, LORA, SHORT, 3)
    interrupted(toys, tmp_path / "checkpoint")
    again, resumed = train_expert(toys, LORA, SHORT, 3, checkpoint=tmp_path / "checkpoint")
    assert adapter_sha256(again) == adapter_sha256(whole)
    assert resumed.signals == report.signals


def test_a_checkpoint_without_signals_resumes_without_them(toys: LocalDomain, tmp_path: Path) -> None:
    whole, _ = train_expert(toys, LORA, SHORT, 3)
    interrupted(toys, tmp_path / "checkpoint")
    state = read_checkpoint(tmp_path / "checkpoint")
    assert state is not None
    assert state.signals is not None
    write_checkpoint(tmp_path / "checkpoint", replace(state, signals=None))
    again, resumed = train_expert(toys, LORA, SHORT, 3, checkpoint=tmp_path / "checkpoint")
    assert adapter_sha256(again) == adapter_sha256(whole)
    assert resumed.signals is None


def test_the_spread_is_the_trace_of_the_users_covariance(toys: LocalDomain) -> None:
    adapter, _ = train_expert(toys, LORA, SHORT, 3)
    packed = pack_sequences(
        toys.table, toys.training_sequences, toys.backbone.special, toys.text.max_items, toys.text.max_tokens
    )
    with applied(toys.backbone, adapter):
        users = encode(toys.backbone, packed).double().numpy()
    trace = float(np.trace(np.cov(users, rowvar=False, bias=True)))
    assert spread_of_users(toys, adapter, 3) == pytest.approx(trace, abs=1e-5)
    alike = make_interactions(["a", "b"], [[*toys.training_sequences[0], 0, 1]] * 2)
    assert spread_of_users(replace(toys, interactions=alike), adapter, 3) == pytest.approx(0.0, abs=1e-6)
