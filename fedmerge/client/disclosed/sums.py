"""A client's noised metric sums, each released once a run; and the number of models that a run may evaluate."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmerge.client.cache.folders import inputs_key
from fedmerge.errors import ClientError, PolicyError, RunDirError
from fedmerge.evaluation.sums import VARIANTS, MetricSums, Variant, metric_sums_from_dict
from fedmerge.files import exclusive, read_sealed, seal, write_json

Sums = dict[Variant, MetricSums]


def release_sums_once(
    folder: Path,
    run: str,
    request: Mapping[str, Any],
    most: int,
    account: Callable[[str], None],
    make: Callable[[], Sums],
) -> Sums:
    """Return the noised sums that answer a request: made, charged and written now, or those sent before.

    Args:
        folder: what the client has disclosed.
        run: run_id; the answers of one run are counted together.
        request: all that the sums depend on, as JSON types.
        most: number of answers in a run that the noise is chosen for.
        account: charges one answer, by its key.
        make: computes the sums and draws the noise.

    Raises:
        PolicyError: the run has had all its answers; an answer on disk is damaged; or it cannot be written.
    """
    key = inputs_key(request)
    path = folder / "sums" / inputs_key({"run": run}) / f"{key}.json"
    try:
        with exclusive(path.parent):  # of two processes that answer the same, the second reads what the first drew
            record = read_sealed(path)
            if record is None:
                if (given := len(list(path.parent.glob("*.json")))) >= most:
                    raise PolicyError(
                        f"run {run} asks for metric sums again, of other models, users or settings; its noise is "
                        f"chosen for {most} answers, and {given} were given. Start a new run."
                    )
                account(f"{run}: metric sums {key}")
                record = {variant: of_variant.to_dict() for variant, of_variant in make().items()}
                write_json(path, seal(record))
        return {variant: metric_sums_from_dict(record[variant]) for variant in VARIANTS}
    except (OSError, RunDirError, LookupError, TypeError, ClientError) as error:
        raise PolicyError(
            f"{path.parent}: the noised metric sums cannot be recorded or read ({error}), so none leave. Check the "
            "files, the space and the permissions there."
        ) from error


def count_models(folder: Path, run: str, sha256s: set[str], most: int) -> None:
    """Refuse a run that evaluates more models than the organisation allows; write down those it has.

    Each further model is a further question about the same users.

    Raises:
        PolicyError: the number of models and the limit; or the record cannot be read or written.
    """
    path = folder / "models" / f"{inputs_key({'run': run})}.json"
    try:
        with exclusive(path.parent):
            known = set((read_sealed(path) or {"models": []})["models"])
            if len(known | sha256s) > most:
                raise PolicyError(
                    f"max_models = {most} of its own policy file: run {run} evaluates {len(known | sha256s)} models. "
                    "Evaluate fewer merges, or agree on another limit with the organisation."
                )
            if not sha256s <= known:
                write_json(path, seal({"models": sorted(known | sha256s)}))
    except (OSError, RunDirError, LookupError, TypeError) as error:
        raise PolicyError(
            f"{path}: the evaluated models cannot be recorded ({error}), so no metric sums leave. Check the files, the "
            "space and the permissions there."
        ) from error
