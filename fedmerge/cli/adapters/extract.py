"""``fedmerge extract``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands

DESCRIPTION = """\
Extract a LoRA adapter from two full models of one architecture: the truncated SVD of what fine-tuning changed in each
linear layer. The result is a PEFT folder, which can be merged with others. Biases, norms, embeddings and layers that
are not chosen stay as in BASE; those that changed are listed."""

MOST_LOST = 8  # names on the screen; provenance.json has all


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    extract = commands.add_parser(
        "extract",
        help="extract a LoRA adapter from two full models",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    extract.add_argument("base", metavar="BASE", help="model before fine-tuning: a folder or a hub id")
    extract.add_argument("tuned", metavar="TUNED", help="model after fine-tuning: a folder or a hub id")
    extract.add_argument("--rank", type=int, required=True, metavar="R", help="largest rank of a module")
    extract.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to create")
    extract.add_argument(
        "--target-modules",
        metavar="NAME,…",
        default="",
        help="names of linear layers, whole or from the right [all but the output head]",
    )
    extract.add_argument("--base-model", metavar="NAME", help="name of the base model in the adapter [name of BASE]")
    extract.set_defaults(command=_extract)


def _extract(options: argparse.Namespace) -> int:
    from fedmerge.api.models import extract
    from fedmerge.files import check_free

    check_free(options.out)
    targets = [target.strip() for target in options.target_modules.split(",") if target.strip()]
    model = extract(
        options.base, options.tuned, rank=options.rank, target_modules=targets, base_model=options.base_model
    )
    model.save(options.out)

    facts = model.provenance
    print("  rank  residual  module")
    for name, module in model.adapter.modules.items():
        print(f"{module.rank:>6}{facts['residuals'][name]:>10.4f}  {name}")
    lost = sorted(facts["lost"].items(), key=lambda entry: (-entry[1], entry[0]))
    for name, share in lost[:MOST_LOST]:
        print(f"lost: {name}, {share:.1%} of the squared change")
    if len(lost) > MOST_LOST:
        rest = sum(share for _, share in lost[MOST_LOST:])
        print(f"lost: {len(lost) - MOST_LOST} more tensors, {rest:.1%}; all are in provenance.json")
    if facts["unmatched"]:
        print(f"only in one of the models, and left out: {', '.join(facts['unmatched'])}")
    print(
        f"{options.out}: {len(model.adapter.modules)} modules, {model.adapter.size_bytes / 1e6:.1f} MB, "
        f"residual {facts['residual']:.4f} of the whole change"
    )
    return 0
