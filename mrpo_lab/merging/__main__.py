"""Is telling a policy lambda worth it?

TOLD is the folder of a run that was told lambda. Each ALONE is one that was not, trained on one
aspect (lambda=fixed lambda.weights={ASPECT: 1}) with the same data, seed and model. Their adapters
are merged with weights lambda (peft's linear merge) at the lambdas that TOLD was tried at, and all
are compared on its test lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mrpo_lab.cli import fail
from mrpo_lab.errors import UserError
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.runs.trade_off import table, write_trade_off


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mrpo_lab.merging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("told", type=Path, metavar="TOLD")
    made.add_argument("alone", type=Path, nargs="+", metavar="ALONE")
    return made


def main(arguments: Sequence[str]) -> int:
    """Exit code; the table goes beside TOLD's own, where the report finds it."""
    asked = parser().parse_args(arguments)
    quiet_libraries()
    from mrpo_lab.merging.compare import Finished, check, compare

    try:
        told = Finished.read(asked.told)
        rows = compare(told, check(told, [Finished.read(folder) for folder in asked.alone]))
    except UserError as error:
        fail(str(error))
        return 2
    file = asked.told / "trade_off_compared.parquet"
    write_trade_off(file, rows)
    print(f"{table(rows, ['pairwise', 'spearman', 'ndcg'])}\n{file}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
