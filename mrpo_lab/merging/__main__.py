"""Compare a policy conditioned on lambda with merged adapters.

CONDITIONED is the folder of a run whose policy has lambda in its prompt (lambda.condition=true).
Each SINGLE is a run without, trained on one aspect (lambda=fixed lambda.weights={ASPECT: 1}) with
the same data, seed and model. The adapters of these runs are merged with weights lambda (peft's
linear merge) at the lambdas at which CONDITIONED was evaluated, and all policies are compared on
its test lists.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mrpo_lab.cli import exit_on_user_error
from mrpo_lab.console import show
from mrpo_lab.progress import quiet_libraries
from mrpo_lab.runs.folder import add_described_file
from mrpo_lab.runs.trade_off import trade_off_table, write_trade_off
from mrpo_lab.storage.files import path_argument


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m mrpo_lab.merging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("conditioned", type=path_argument, metavar="CONDITIONED")
    made.add_argument("single", type=path_argument, nargs="+", metavar="SINGLE")
    return made


@exit_on_user_error
def main(arguments: Sequence[str]) -> int:
    """Write the comparison into CONDITIONED's folder, where the report finds it, and print it."""
    given = parser().parse_args(arguments)
    quiet_libraries()
    from mrpo_lab.merging.merged_policies import FinishedRun, by_aspect, merged_trade_off

    conditioned = FinishedRun.open(given.conditioned)
    single = by_aspect(conditioned, [FinishedRun.open(folder) for folder in given.single])
    rows = merged_trade_off(conditioned, single)
    file = given.conditioned / "trade_off_compared.parquet"
    write_trade_off(file, rows)
    add_described_file(given.conditioned, file.name)
    show(trade_off_table(rows, ["pairwise", "spearman", "ndcg"]))
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
