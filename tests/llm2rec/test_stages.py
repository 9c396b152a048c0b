"""The server's stages on a merge against slow definitions, with transformers' own models."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from backbones import tiny_bert
from tiny_families import causal_llama, llama
from transformers import AutoModel, AutoModelForCausalLM

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.config import ExperimentConfig, Lora, Mntp, Simcse, from_flat
from fedmerge.config.model import BackboneSection
from fedmerge.device import resolve_compute
from fedmerge.domain.catalog import make_catalog
from fedmerge.encoder.attention import attention_dropout
from fedmerge.encoder.backbone import Backbone, open_backbone
from fedmerge.encoder.encode import embed_batch, training_groups
from fedmerge.encoder.lora import fresh_adapter
from fedmerge.errors import BackboneError, ConfigError, MergeError
from fedmerge.llm2rec.head import language_head, token_losses
from fedmerge.llm2rec.masking import Title, mask_token, masked
from fedmerge.llm2rec.stages import (
    StageSettings,
    check_stages,
    contrast,
    mntp_loss,
    simcse_loss,
    tokenised,
    torch_seeded,
    train_stages,
)
from fedmerge.merging.candidate import Candidate, MergeVariant, Origin, provenance_of_merge
from fedmerge.seeding import generator
from fedmerge.server.refined import distinct_titles, refined_candidates

TITLES = ["blue soap", "green tent", "large doll", "red car", "small toy", "steel stove"]
LORA = Lora(rank=2, alpha=4, target_modules=("q_proj", "v_proj"))
SETTINGS = StageSettings(
    Mntp(steps=5, batch_size=3, learning_rate=0.03),
    Simcse(steps=5, batch_size=4, learning_rate=0.03, warmup_steps=2),
    LORA,
    7,
)


def opened(folder: Path, **section: Any) -> Backbone:
    given = {"attention": "both-ways", "pooling": "mean", **section}
    return open_backbone(BackboneSection(source=str(folder), **given), resolve_compute("cpu", "float32"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return causal_llama(tmp_path_factory.mktemp("stages") / "llama")


@pytest.fixture(scope="module")
def decoder(folder: Path) -> Backbone:
    return opened(folder)


@pytest.fixture(scope="module")
def merged_adapter(decoder: Backbone) -> Adapter:
    """An adapter of another rank than what the stages train."""
    made = fresh_adapter(decoder, Lora(rank=3, alpha=3, target_modules=("q_proj", "v_proj")), 1)
    for name, module in made.modules.items():
        drawn = generator(0, "test", name).standard_normal(tuple(module.lora_B.shape))
        module.lora_B.copy_(torch.from_numpy(0.1 * drawn))
    return made


# Masked next-token prediction


def test_shares_of_masked_random_and_kept_tokens() -> None:
    """Token by token: chosen with .2, of these .8 masked, .1 any token, .1 as they were; a title's tokens alone."""
    tokens = np.concatenate([[1, 2], np.arange(20_000) % 97 + 3, [1]]).astype(np.int32)
    title = Title(tokens, 2, 20_002)
    found, positions, right = masked(title, 0.2, 99, 1000, generator(0, "test"))
    rng = generator(0, "test")
    chosen, kind, drawn = rng.random(20_000), rng.random(20_000), rng.integers(1000, size=20_000)
    counts = {"masked": 0, "random": 0, "kept": 0}
    for place in range(20_000):
        wanted = tokens[place + 2]
        if chosen[place] < 0.2:
            name = "masked" if kind[place] < 0.8 else "random" if kind[place] < 0.9 else "kept"
            counts[name] += 1
            wanted = {"masked": 99, "random": drawn[place], "kept": wanted}[name]
        assert found[place + 2] == wanted
    assert positions == [place + 2 for place in range(20_000) if chosen[place] < 0.2]
    assert right == tokens[positions].tolist()
    assert (found[:2].tolist(), found[-1]) == ([1, 2], 1)
    assert len(positions) / 20_000 == pytest.approx(0.2, abs=0.015)
    shares = {name: number / len(positions) for name, number in counts.items()}
    assert shares == {
        "masked": pytest.approx(0.8, abs=0.03),
        "random": pytest.approx(0.1, abs=0.02),
        "kept": pytest.approx(0.1, abs=0.02),
    }


def logits_both_ways(folder: Path, tokens: np.ndarray) -> torch.Tensor:
    """Every token sees every token, by an explicit mask."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.eval()
    size = len(tokens)
    with torch.no_grad():
        output = model(input_ids=torch.from_numpy(tokens).long()[None], attention_mask=torch.zeros(1, 1, size, size))
    return cast(torch.Tensor, output.logits[0].log_softmax(dim=-1))


def test_the_loss_of_masked_tokens_is_that_of_the_definition(decoder: Backbone, folder: Path) -> None:
    titles, mask = tokenised(decoder, TITLES), mask_token(decoder.tokenizer)
    assert decoder.tokenizer.convert_ids_to_tokens(mask) == "_"
    found = mntp_loss(decoder, language_head(decoder, "test"), titles, 0.4, mask, generator(3, "test"))
    rng, total, number = generator(3, "test"), 0.0, 0
    for title in titles:
        shown, positions, right = masked(title, 0.4, mask, len(decoder.tokenizer), rng)
        logits = logits_both_ways(folder, shown)
        for position, token in zip(positions, right, strict=True):
            total, number = total - float(logits[position - 1, token]), number + 1
    assert number > 10
    assert float(found) == pytest.approx(total / number, rel=1e-5)


def test_the_last_token_changes_the_first_state_only_both_ways(decoder: Backbone) -> None:
    head, one = language_head(decoder, "test"), np.arange(4, 14, dtype=np.int32)
    other = np.concatenate([one[:-1], [99]]).astype(np.int32)

    def of_second(tokens: np.ndarray, hide_later: bool) -> float:
        return float(token_losses(decoder, head, [tokens], [[1]], [[5]], hide_later=hide_later))

    assert of_second(one, False) != pytest.approx(of_second(other, False), abs=1e-3)
    assert of_second(one, True) == of_second(other, True)
    assert of_second(one, False) != pytest.approx(of_second(one, True), abs=1e-3)  # and the switch is back


def test_a_batch_without_a_chosen_token_is_drawn_again(decoder: Backbone) -> None:
    titles = tokenised(decoder, ["a", "b"])
    assert math.isfinite(float(mntp_loss(decoder, language_head(decoder, "test"), titles, 0.01, 5, generator(0, "x"))))


# Contrast of two passes


def test_the_contrast_is_that_of_the_definition() -> None:
    first, second = (torch.nn.functional.normalize(torch.randn(5, 8, generator=drawn(seed)), dim=1) for seed in (1, 2))
    total = 0.0
    for i in range(5):
        scores = [math.exp(10 * sum(a * b for a, b in zip(first[i], second[j], strict=True))) for j in range(5)]
        total -= math.log(scores[i] / sum(scores))
    assert float(contrast(first, second, 0.1)) == pytest.approx(total / 5, rel=1e-5)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_two_passes_are_those_of_transformers_with_attention_dropout(decoder: Backbone, folder: Path) -> None:
    titles = tokenised(decoder, ["aaaa", "bbbb", "cccc", "dddd", "eeee"])  # of one length: no padding
    state = torch.get_rng_state()
    with torch_seeded(5, torch.device("cpu")):
        found = float(simcse_loss(decoder, titles, 0.2, 0.1))
    assert torch.equal(torch.get_rng_state(), state)
    model = AutoModel.from_pretrained(folder, attn_implementation="eager", attention_dropout=0.2).train()
    groups, passes = training_groups([title.tokens for title in titles]), []
    with torch_seeded(5, torch.device("cpu")), torch.no_grad():
        for _ in range(2):
            vectors = torch.empty(5, 32)
            for group in groups:
                rows = torch.tensor(np.stack([titles[index].tokens for index in group]), dtype=torch.int64)
                size = rows.shape[1]
                mask = torch.zeros(len(rows), 1, size, size)
                vectors[torch.from_numpy(group)] = model(input_ids=rows, attention_mask=mask).last_hidden_state.mean(1)
            passes.append(torch.nn.functional.normalize(vectors, dim=1))
    assert not torch.allclose(passes[0], passes[1], atol=1e-3)
    assert found == pytest.approx(float(contrast(passes[0], passes[1], 0.1)), rel=1e-4)


def test_dropout_ends_with_its_block(decoder: Backbone) -> None:
    sequences = [title.tokens for title in tokenised(decoder, TITLES)]
    before = embed_batch(decoder, sequences)
    with attention_dropout(decoder.model, 0.5):
        assert not torch.equal(embed_batch(decoder, sequences), before)
    assert torch.equal(embed_batch(decoder, sequences), before)
    assert not any(module.training for module in decoder.model.modules())


# The stages together


def stopping(line: str) -> Callable[[str], None]:
    def progress(found: str) -> None:
        if found.startswith(line):
            raise KeyboardInterrupt

    return progress


def test_a_killed_stage_resumes_to_the_same_bytes(decoder: Backbone, merged_adapter: Adapter, tmp_path: Path) -> None:
    weights = {name: tensor.clone() for name, tensor in decoder.model.state_dict().items()}
    whole, losses = train_stages(decoder, merged_adapter, TITLES, SETTINGS)
    assert {name: len(of_stage) for name, of_stage in losses.items()} == {"mntp": 5, "simcse": 5}
    for line in ("mntp: step 4/5", "simcse: step 1/5", "simcse: step 4/5"):  # within a stage, and between both
        state = tmp_path / f"{line.replace('/', '-')}.safetensors"
        with pytest.raises(KeyboardInterrupt):
            train_stages(decoder, merged_adapter, TITLES, SETTINGS, stopping(line), state, keep_every=1)
        resumed, again = train_stages(decoder, merged_adapter, TITLES, SETTINGS, checkpoint=state, keep_every=1)
        assert adapter_sha256(resumed) == adapter_sha256(whole)
        assert again == losses
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.model.state_dict().items())


def test_stages_learn_and_add_to_the_merge(decoder: Backbone, merged_adapter: Adapter) -> None:
    settings = {"lora.rank": 2, "lora.alpha": 4, "lora.target_modules": "q_proj,v_proj", "seed": 7}
    settings |= {"mntp.steps": 30, "mntp.batch_size": 6, "mntp.learning_rate": 0.03, "mntp.share": 0.5}
    config = from_flat({"backbone.attention": "both-ways", "backbone.pooling": "mean", **settings})
    origin = Origin({"a": "1", "b": "2"}, decoder.record, "adapter+catalog")
    merge = Candidate(merged_adapter, provenance_of_merge(MergeVariant("average"), merged_adapter, origin))
    catalogs = {"b": catalog("b", TITLES[2:]), "a": catalog("a", TITLES[:3])}
    (refined,) = refined_candidates([merge], decoder, catalogs, config)
    assert (refined.label, refined.method) == ("llm2rec-style average", "llm2rec-style")
    recorded = refined.provenance.stages or {}
    assert (recorded["of"], recorded["of_sha256"]) == ("average", merge.provenance.sha256)
    assert recorded["num_titles"] == len(TITLES)
    assert recorded["style"].startswith("LLM2Rec-style (arXiv:2506.21579)")
    assert np.mean(recorded["losses"]["mntp"][-5:]) < np.mean(recorded["losses"]["mntp"][:5])
    stages, _ = train_stages(decoder, merged_adapter, TITLES, StageSettings(config.mntp, config.simcse, config.lora, 7))
    for name, module in refined.adapter.modules.items():
        total = merged_adapter.modules[name].delta_weight() + stages.modules[name].delta_weight()
        torch.testing.assert_close(module.delta_weight(), total, atol=1e-6, rtol=1e-5)
    turned = {"a": catalogs["a"], "b": catalogs["b"]}
    assert refined_candidates([merge], decoder, turned, config)[0].provenance == refined.provenance
    assert refined_candidates([merge], decoder, catalogs, config, finished={refined.label: refined}) == [refined]
    with pytest.raises(MergeError, match="found no title in the catalogs"):
        refined_candidates([merge], decoder, {}, config)


def catalog(name: str, titles: list[str]) -> Any:
    return make_catalog(name, [f"{name}{row}" for row in range(len(titles))], {"title": titles})


def test_no_step_is_no_merge(decoder: Backbone, merged_adapter: Adapter) -> None:
    origin = Origin({"a": "1"}, decoder.record, "adapter+catalog")
    merge = Candidate(merged_adapter, provenance_of_merge(MergeVariant("average"), merged_adapter, origin))
    assert refined_candidates([merge], None, {}, ExperimentConfig()) == []
    assert not ExperimentConfig().refines_merges
    assert "stages" not in merge.provenance.to_dict()


def test_titles_are_distinct_and_sorted(decoder: Backbone) -> None:
    catalogs = {"b": catalog("b", ["red tent", "soap"]), "a": catalog("a", ["soap", "a very long title"])}
    assert distinct_titles(decoder, catalogs, 6) == ["a ver", "red t", "soap"]


# What is refused


def test_backbones_that_would_be_served_otherwise_are_refused(folder: Path, tmp_path: Path) -> None:
    on, off = Mntp(steps=1), Mntp()
    for backbone, message in (
        (opened(folder, attention="causal"), r"mntp.steps trains a decoder that attends both ways"),
        (opened(folder, pooling="last"), r"mean of all tokens, but it is served with backbone.pooling = 'last'"),
        (opened(llama(tmp_path / "bare")), r"mntp.steps needs the language-model head"),
        (opened(tiny_bert(tmp_path / "bert")), r"mntp.steps predicts tokens.*type bert"),
    ):
        check_stages(backbone, off, Simcse())
        with pytest.raises(BackboneError, match=message):
            check_stages(backbone, on, Simcse())
    check_stages(opened(llama(tmp_path / "again")), off, Simcse(steps=1))  # which needs no head


BOTH_WAYS = {"mntp.steps": 10, "backbone.attention": "both-ways"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mntp.steps": 10}, r"mntp.steps = 10 trains a decoder that attends both ways, but backbone.attention"),
        ({"simcse.steps": 5, "backbone.family": "blair"}, r"simcse.steps = 5 is for decoders"),
        ({**BOTH_WAYS, "backbone.pooling": "last"}, r"backbone.pooling = 'last' is served"),
        ({**BOTH_WAYS, "privacy.policy": "catalog-private"}, r"keeps them at the clients; set privacy.policy"),
        ({**BOTH_WAYS, "privacy.policy": "adapter"}, r"keeps them at the clients; set server.catalogs to a folder"),
        ({**BOTH_WAYS, "privacy.policy": "aggregate-only"}, r"keeps them at the clients; set server.catalogs"),
    ],
)
def test_contradictions_are_named_and_remedied(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_flat({"merge.methods": "average", **changes})


def test_the_server_may_have_the_catalogs_in_a_folder() -> None:
    some = {**BOTH_WAYS, "server.catalogs": "catalogs", "merge.methods": "average"}
    assert from_flat({**some, "privacy.policy": "adapter"}).refines_merges
    assert from_flat({"mntp.steps": 1, "backbone.family": "llm2vec"}).refines_merges
    assert not from_flat({**BOTH_WAYS, "until": "train"}).refines_merges
