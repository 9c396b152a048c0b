"""The page of a finished run: the tables of a benchmark with one seed, and the sections that only a run has."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge.config import Split
from fedmerge.errors import RunDirError
from fedmerge.evaluation.sums import EXPERT, VARIANTS, MetricSums, Variant
from fedmerge.files import read_record, table_or_empty
from fedmerge.merging.candidate import Provenance
from fedmerge.privacy.dp.statement import PRIVACY_FILE
from fedmerge.report.bench.dataset import dataset_of
from fedmerge.report.bench.learning import curves_section
from fedmerge.report.bench.page import bench_page, looks_of
from fedmerge.report.bench_tables import BenchTables
from fedmerge.report.html.page import (
    ABSENT,
    Cell,
    Column,
    Html,
    Section,
    element,
    facts,
    join,
    note,
    number_cell,
    seconds,
    size,
    table,
)
from fedmerge.report.run.alone import (
    EXPLAINED,
    MEAN,
    METRIC,
    SASREC,
    TITLE,
    Comparison,
    compare_alone,
    their,
)
from fedmerge.report.run.first import first_section, missing_fact, privacy_fact, trained_entries
from fedmerge.report.run.many import (
    WORST,
    first_domains,
    listed,
    mean_rows,
    note_on_shown,
    only,
    percentiles_table,
    search_box,
    worst_domains,
)
from fedmerge.report.run.promise import PRIVACY_SECTION, promise_section
from fedmerge.report.run.verdict import Judged, judge_run, verdict
from fedmerge.report.statistics import comparison_rows
from fedmerge.report.tables import Role, difference_cell
from fedmerge.runs.checkpoints import HEADS
from fedmerge.runs.exposure import EXPOSURE_TABLE, read_exposure
from fedmerge.runs.folder import ADMISSION
from fedmerge.runs.metric_sums import read_domain_roles, read_metric_sums
from fedmerge.runs.reading import RunDetails, describe_run
from fedmerge.runs.round_checkpoints import round_records
from fedmerge.server.choice import SERVED, served_row, with_served

_SPLITS: tuple[Split, ...] = ("valid", "test")


def run_page(folder: Path) -> str:
    """Return the HTML page of a finished run.

    Raises:
        RunDirError: the run is not finished, or its folder is damaged.
    """
    run = describe_run(folder)
    if run.summary.state != "done":
        raise RunDirError(
            f"{folder}: the run is {run.summary.state}; expected a finished run. Resume it with "
            f"fedmerge run --resume {folder}, or see its partial results with fedmerge show {folder}"
        )
    folder = run.summary.folder
    statement = read_record(folder / PRIVACY_FILE)
    if run.settings.get("until") == "train":
        return _page_of_training(run, statement)
    judged = judge_run(folder, run.choice)
    shown = worst_domains(judged["unmasked"])
    tables = run_tables(run, shown)
    sums = {variant: read_metric_sums(folder, "test", variant) for variant in VARIANTS}
    per_domain = trained_entries(run, judged["unmasked"])
    compared = compare_alone(sums["unmasked"], per_domain, str(run.summary.served))
    sections = [
        (
            "domains",
            "Domains",
            None if shown is None else _domains(folder, sums["unmasked"], judged["unmasked"], compared),
        ),
        ("alone", TITLE, _alone(run, sums, per_domain, shown)),
        ("clients", "Participants", _participants(run, shown)),
        ("choice", "Selected on validation", _choice(run, judged["unmasked"])),
        ("heads", "Heads", _heads(folder, shown)),
        (PRIVACY_SECTION, "What is promised about privacy", promise_section(statement, run.settings, shown)),
        ("exposure", "Data that left each client", _exposure(folder, shown)),
    ]
    more = [Section(key, heading, content) for key, heading, content in sections if content]
    first = first_section(run, compared, judged["unmasked"], statement, looks_of(tables), shown)
    return bench_page(tables, kind="Run", lead=_lead(judged), first=first, more=more)


def _page_of_training(run: RunDetails, statement: Mapping[str, Any]) -> str:
    """Return the page of a run that ends with the experts: nothing was merged or evaluated."""
    shown = first_domains(run.participants)
    tables = BenchTables(
        title=run.summary.id,
        synthetic=bool(run.summary.synthetic),
        curves=[{**_place(run), **row} for row in _curves(run.summary.folder, by_domain=shown is None)],
        cells=[_cell(run)],
    )
    lead = element("p", "The experts are trained; nothing was merged or evaluated (until = 'train').")
    first = join(
        facts([("Privacy", privacy_fact(run, statement)), ("Missing", missing_fact(run))]),
        note_on_shown(len(run.participants), shown, "the first by name"),
    )
    data = dataset_of(tables, _place(run)["dataset"], looks_of(tables), "")
    sections = [
        ("curves", "Training curves", curves_section(data)),
        ("clients", "Participants", _participants(run, shown)),
        (PRIVACY_SECTION, "What is promised about privacy", promise_section(statement, run.settings, shown)),
        ("exposure", "Data that left each client", _exposure(run.summary.folder, shown)),
    ]
    more = [Section(key, heading, content) for key, heading, content in sections if content]
    return bench_page(tables, kind="Run", lead=lead, first=first, more=more)


def _lead(judged: Mapping[Variant, Judged]) -> Html:
    """Say first of all whether what is served is better than no model."""
    found = verdict(judged)
    if found.is_warning:
        return element("p", found.text, class_="warning", role="note")
    return element("p", found.text, class_="verdict")


def run_tables(run: RunDetails, shown: Sequence[str] | None = None) -> BenchTables:
    """Return a run as the tables of a benchmark whose strategies are the run's methods.

    Args:
        run: a finished run.
        shown: domains with rows of their own; None for all. With fewer than all, results on test, their comparisons and
            the curves are means over domains, so that nothing grows with the number of domains.

    Raises:
        RunDirError: a table or record is missing or damaged.
    """
    folder, place = run.summary.folder, _place(run)
    roles = read_domain_roles(folder)
    validation = run.choice.get("validation")
    merged = list(validation) if isinstance(validation, dict) else []
    results: list[dict[str, Any]] = []
    comparisons: list[dict[str, Any]] = []
    methods: dict[str, None] = {}
    for split in _SPLITS if shown is None else _SPLITS[1:]:
        for variant in VARIANTS:
            sums = read_metric_sums(folder, split, variant)
            if split == "test":
                sums = {domain: _with_served(of_domain, run, domain) for domain, of_domain in sums.items()}
                methods |= dict.fromkeys(method for of_domain in sums.values() for method in of_domain.methods)
            scores = _scores(sums, roles) if shown is None else mean_rows(sums, roles)
            results += [{**place, "split": split, "variant": variant, **score} for score in scores]
            if split == "test":
                comparisons += _comparisons(sums, roles, place["dataset"], merged, by_domain=shown is None)
    order = {method: place for place, method in enumerate(methods)}
    results.sort(key=lambda row: order.get(row["strategy"], len(order)))
    coefficients = [{**place, **row} for row in _coefficients(run) if shown is None or row["domain"] in shown]
    return BenchTables(
        title=run.summary.id,
        synthetic=bool(run.summary.synthetic),
        results=results,
        comparisons=comparisons,
        curves=[{**place, **row} for row in _curves(folder, by_domain=shown is None)],
        coefficients=coefficients,
        cells=[_cell(run)],
        references=tuple(method for method in methods if method not in merged),
    )


def _scores(sums: Mapping[str, MetricSums], roles: Mapping[str, Role]) -> Iterator[dict[str, Any]]:
    return (
        {
            "strategy": method,
            "label": method,
            "domain": domain,
            "role": roles[domain],
            "metric": metric,
            "num_users": of_domain.num_users,
            "value": value,
        }
        for domain, of_domain in sums.items()
        for method, metrics in of_domain.metrics_by_method().items()
        for metric, value in metrics.items()
    )


def _place(run: RunDetails) -> dict[str, Any]:
    seed = run.settings.get("seed", 0)
    name = str(run.settings.get("name", run.summary.folder.name))
    return {"dataset": name, "seed": seed if isinstance(seed, int) else 0, "left_out": ""}


def _cell(run: RunDetails) -> dict[str, Any]:
    return {
        **_place(run),
        "strategy": ", ".join(run.summary.methods),
        "status": run.summary.state,
        "seconds": run.summary.seconds,
        "config": dict(run.settings),
        "environment": read_record(run.summary.folder / "environment.json"),
    }


def _with_served(sums: MetricSums, run: RunDetails, domain: str) -> MetricSums:
    """Add a row for the model that this domain is served, if models were selected per domain."""
    per_domain, served = run.choice.get("per_domain"), run.summary.served
    if not isinstance(per_domain, dict) or not per_domain or served not in sums.methods:
        return sums
    row = served_row(per_domain, str(served), domain)
    return with_served(sums, row if row in sums.methods else str(served))


def _comparisons(
    sums: Mapping[str, MetricSums], roles: Mapping[str, Role], name: str, merged: Sequence[str], *, by_domain: bool
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for role in ("train", "unseen"):
        of_role = {(0, domain): of_domain for domain, of_domain in sums.items() if roles[domain] == role}
        methods = [method for of_domain in of_role.values() for method in of_domain.methods]
        baseline = next((method for method in ("average", *merged) if method in methods), None)
        if baseline and min(of_domain.num_users for of_domain in of_role.values()) > 1:
            rows += comparison_rows(of_role, dataset=name, baseline=baseline, role=role, by_domain=by_domain)
    return rows


def _curves(folder: Path, *, by_domain: bool = True) -> list[dict[str, Any]]:
    """Return the points of all curves; without ``by_domain``, those of all domains are points of one curve."""
    over = "" if by_domain else ", mean and range over domains"
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("adapters/*/training.json")):
        for validation in read_record(path).get("validations", ()):
            for key, name in (("ndcg", "Experts, NDCG@10 on validation"), ("loss", "Experts, loss")):
                if validation.get(key) is not None:
                    domain = path.parent.name if by_domain else ""
                    rows.append(_point(EXPERT, domain, validation["step"], name + over, validation[key]))
    for number, of_round in enumerate(round_records(folder), start=1):
        for domain, client in of_round["clients"].items():
            if client.get("loss") is not None:
                name = "Rounds, loss of the clients" + over
                rows.append(_point("rounds", domain if by_domain else "", number, name, client["loss"]))
    for path in sorted(folder.glob("merged/*/provenance.json")):
        provenance = Provenance.from_dict(read_record(path))
        label = provenance.label or path.parent.name
        for step, losses in enumerate(provenance.losses or (), start=1):
            names = losses if len(losses) > 2 else ("total",)  # a single term, times its weight, is the total
            rows += [_point(label, "", step, f"Merges, {name} loss", losses[name]) for name in names]
        for step, score in provenance.validation or ():
            rows.append(_point(label, "", step, "Merges, validation score", score))
    return rows


def _point(strategy: str, domain: str, step: int, name: str, value: float) -> dict[str, Any]:
    return {"strategy": strategy, "domain": domain, "step": step, "name": name, "value": value}


def _coefficients(run: RunDetails) -> list[dict[str, Any]]:
    rows = []
    for merge in run.merges:
        groups = merge.provenance.coefficient_groups
        for domain, values in (merge.provenance.coefficients or {}).items():
            numbers = values if isinstance(values, list) else [values]
            names = (
                groups if groups is not None and len(groups) == len(numbers) else [str(i) for i in range(len(numbers))]
            )
            label = merge.provenance.label or merge.label
            for group, value in zip(names, numbers, strict=True):
                rows.append({"strategy": label, "domain": domain, "group": group, "value": value})
    return rows


# Sections that only a run has


def _domains(folder: Path, sums: Mapping[str, MetricSums], judged: Judged, compared: Sequence[Comparison]) -> Html:
    """Return the spread over domains and a search, in the place of tables of all of them."""
    return join(
        percentiles_table(sums, read_domain_roles(folder)),
        search_box(judged, {row.domain: row for row in compared}),
    )


def _alone(
    run: RunDetails,
    sums: Mapping[Variant, Mapping[str, MetricSums]],
    per_domain: Mapping[str, Any],
    shown: Sequence[str] | None,
) -> Html | None:
    """Compare what each domain has for itself with what it is served, by variant."""
    body = []
    for variant in VARIANTS if per_domain else ():
        for alone in (None, SASREC):
            rows = {row.domain: row for row in compare_alone(sums[variant], per_domain, str(run.summary.served), alone)}
            for row in (rows[domain] for domain in only(rows, None if shown is None else [*shown, MEAN])):
                text, marked = difference_cell(row.difference)
                mean = row.difference.mean if row.difference else None
                names = [row.domain, variant, row.alone or alone or ABSENT, row.joined or ABSENT]
                scores = [number_cell(score, f"{score:.4f}") for score in row.scores]
                body.append([*(Cell(name, name) for name in names), *scores, number_cell(mean, text, best=marked)])
    if not body:
        return None
    heads = [
        *(Column(title, numeric=False) for title in ("Domain", "Ranking", "Alone", "Joined")),
        *(Column(title) for title in ("Score alone", "Score joined", "Difference")),
    ]
    return join(
        table("alone-table", f"{TITLE}: {METRIC} on test", heads, body),
        note(f"{EXPLAINED} Difference ± half-width of its 95 % interval, paired over users; bold: it excludes 0."),
    )


def _participants(run: RunDetails, shown: Sequence[str] | None) -> Html:
    counts = ("num_users", "num_items", "num_interactions")
    heads = [
        *(Column(title, numeric=False) for title in ("Domain", "Role")),
        *(Column(title) for title in ("Users", "Items", "Interactions", "Steps", "Best step", "Training")),
    ]
    body = []
    for name in only(run.participants, shown):
        client = run.participants[name]
        expert = run.experts.get(name, {})
        numbers = [client.get(count) for count in counts] + [expert.get("steps"), expert.get("best_step")]
        body.append(
            [
                Cell(name, name),
                Cell(str(client.get("role", ABSENT)), str(client.get("role", ""))),
                *(number_cell(n, f"{n:,}" if isinstance(n, int) else ABSENT) for n in numbers),
                number_cell(expert.get("seconds"), seconds(expert.get("seconds"))),
            ]
        )
    gate = read_record(run.summary.folder / ADMISSION)
    flagged = gate.get("failed", {}) if gate.get("action") == "flag" else {}
    zero = {
        name: "Its expert is zero, that is the untouched backbone."
        for name, expert in run.experts.items()
        if expert.get("nothing_learned") is True
    }
    named = [("Missing", run.summary.missing), ("Flagged, but still merged", flagged), ("Nothing was learned", zero)]
    said = []
    for what, reasons in named:
        said += [element("p", element("strong", f"{what}: {name}. "), reasons[name]) for name in [*reasons][:WORST]]
        if (more := len(reasons) - WORST) > 0:
            said.append(element("p", element("strong", f"{what}: {more:,} more.")))
    return join(table("clients-table", "Clients and the training of their experts", heads, body), *said)


def _heads(folder: Path, shown: Sequence[str] | None) -> Html | None:
    """Tabulate how the clients' own heads were trained, as far as the clients report it."""
    body = []
    paths = {path.stem: path for path in sorted((folder / HEADS).glob("*.json"))}
    for path in (paths[domain] for domain in only(paths, shown)):
        for vectors, report in table_or_empty(read_record(path).get("reports")).items():
            counts = [report.get("epochs"), report.get("best_epoch")]
            why = "" if report.get("trained") else str(report.get("reason", ""))
            weights = {
                variant: ", ".join(f"{source} {weight:.1f}" for source, weight in of_variant.items())
                for variant, of_variant in table_or_empty(report.get("weights")).items()
            }
            fusion = [weights.get(variant, ABSENT) for variant in VARIANTS]
            body.append(
                [
                    *(Cell(text, text) for text in (path.stem, vectors)),
                    *(number_cell(count, ABSENT if count is None else f"{count:,}") for count in counts),
                    number_cell(report.get("seconds"), seconds(report.get("seconds"))),
                    *(Cell(why or text, text) for text in fusion),
                ]
            )
    heads = [
        *(Column(title, numeric=False) for title in ("Domain", "Vectors of")),
        *(Column(title) for title in ("Epochs", "Best epoch", "Training")),
        *(Column(f"Fusion, {variant}", numeric=False) for variant in VARIANTS),
    ]
    return table("heads-table", "Heads of the clients, by the item vectors they read", heads, body) if body else None


def _choice(run: RunDetails, judged: Judged) -> Html | None:
    scores = run.choice.get("validation")
    if not isinstance(scores, dict) or not scores:
        return None
    highest = max(scores.values())
    beaten = [row for row, against in judged.means.items() if not against.is_above]
    tags = ["served", *(f"on test not above {row}" for row in beaten)]
    body = [
        [
            Cell(
                join(label, *(element("span", tag, class_="tag") for tag in tags if label == run.summary.served)),
                label,
            ),
            number_cell(score, f"{score:.4f}", best=score == highest),
        ]
        for label, score in scores.items()
    ]
    heads = [Column("Merge", numeric=False), Column(str(run.summary.metric))]
    per_domain, by_row = table_or_empty(run.choice.get("per_domain")), dict[str, list[str]]()
    for domain in per_domain:
        by_row.setdefault(served_row(per_domain, str(run.summary.served), domain), []).append(domain)
    instead = [
        note(f"Served {their(row)}, in the row “{SERVED}” too: {listed(domains)}.")
        for row, domains in by_row.items()
        if row != run.summary.served
    ]
    dropped, back = run.choice.get("dropped") or {}, run.choice.get("rollback") or {}
    worse = note(f"The merge selected first is significantly worse than their own expert: {listed([*dropped])}.")
    rolled = note(f"Rolled back from {back.get('from')} to {back.get('to')}.")
    scores_table = table("choice-table", "Mean over training domains on validation, unmasked", heads, body)
    return join(scores_table, *instead, worse if dropped else None, rolled if back else None)


def _exposure(folder: Path, shown: Sequence[str] | None) -> Html | None:
    if not (folder / EXPOSURE_TABLE).exists():
        return None
    rows = read_exposure(folder)
    messages = list(dict.fromkeys(row.message for row in rows))
    sums = {(row.domain, row.message): row.size_bytes for row in rows}
    body = []
    for domain in only(dict.fromkeys(row.domain for row in rows), shown):
        numbers = [sums.get((domain, message)) for message in messages]
        total = sum(number or 0 for number in numbers)
        body.append(
            [Cell(domain, domain), *(number_cell(n, size(n)) for n in numbers), number_cell(total, size(total))]
        )
    of_all = [sum(row.size_bytes for row in rows if row.message == message) for message in messages]
    all_cells = [number_cell(n, size(n)) for n in (*of_all, sum(of_all))]
    body.append([Cell(element("strong", "All domains"), ""), *all_cells])
    heads = [Column("Domain", numeric=False), *(Column(message) for message in messages), Column("All")]
    return join(
        table("exposure-table", "Bytes from each client to the server, by message", heads, body),
        note(
            "exposure.parquet has every name, shape and size. An adapter is computed from private data and can reveal "
            "some of it."
        ),
    )
