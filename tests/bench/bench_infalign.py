"""InfAlign's transforms at a requested KL: the KL obtained, and win rates beside their exact values.

A tabular policy with known quantiles of its answers stands behind the real app (tests/support/infalign.py). Each request
draws a pool and its own calibration answers; `"select": {"name": "softmax", "kl": ...}` solves for the temperature. The
exact win rates are integrals over the quantile, at the temperature that has this KL (arXiv 2412.19792, section 4).

    make bench-infalign              (about a minute)
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH is set
from infalign import TRANSFORMS, exact, run_table
from report import write_section

KLS = (0.25, 1.0)


def main() -> None:
    """Run all cells and write the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=12, help="requests of a cell (12)")
    parser.add_argument("--candidates", type=int, default=256, help="candidates of a request (256)")
    parser.add_argument("--calibration", type=int, default=256, help="calibration answers of a request (256)")
    args = parser.parse_args()
    cells = [(name, kl) for kl in KLS for name in TRANSFORMS]
    found = run_table(cells, args.requests, args.candidates, args.calibration)
    lines = [
        f"{args.requests} requests a row over HTTP, each with {args.candidates} candidates of a tabular policy, "
        f"{args.calibration} calibration answers of its own and softmax at the KL asked for. KL obtained: "
        "`diagnostics.kl`, mean (largest distance from what was asked); KL of the answers: of their mean distribution "
        "from the policy, in 32 bins (whose noise adds a little). All rows have the same seeds. Win rates of one answer, of the best and "
        "of the worst of 4, against as many of the policy: measured ± standard error (bootstrap over requests), and exact.",
        "",
        "| transform | KL asked | KL obtained | KL of the answers | win rate | exact | best of 4 | exact | worst of 4 "
        "| exact |",
        "|---|" + "---|" * 9,
    ]
    results = []
    for (name, kl), asked in found.items():
        rates, errors, truth = asked.win_rates(), asked.standard_errors(), exact(name, kl)
        off = float(np.abs(asked.kl - kl).max())
        pairs = [f"{r:.4f} ± {e:.4f} | {t:.4f}" for r, e, t in zip(rates, errors, truth, strict=True)]
        lines.append(
            f"| {name} | {kl:g} | {asked.kl.mean():.6f} ({off:.0e}) | {asked.distribution_kl():.3f} | {' | '.join(pairs)} |"
        )
        results.append(
            {"transform": name, "kl_asked": kl, "kl_obtained": asked.kl.tolist(), "kl_of_answers": asked.distribution_kl(),
             "rates": rates.tolist(), "standard_errors": errors.tolist(), "exact": truth.tolist()}
        )  # fmt: skip
    worst = max(
        float((np.abs(np.array(r["rates"]) - r["exact"]) / np.array(r["standard_errors"])).max()) for r in results
    )
    lines += ["", f"Largest distance of a win rate from its exact value: {worst:.1f} standard errors."]
    write_section(
        "infalign", "KL asked for and KL obtained", "make bench-infalign", lines,
        {"settings": vars(args), "cells": results},
    )  # fmt: skip


if __name__ == "__main__":
    main()
