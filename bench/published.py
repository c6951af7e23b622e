"""What papers print, a number a row, with what is wrong or doubtful about it; nothing here is a result of ours."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

PUBLISHED = Path(__file__).parent.parent / "leaderboards" / "published"

PAPERS = {
    "cear": "CEAR: Certified Ensemble Adversarial Robustness in DNNs",
    "edlcm": "Ensemble Adversarial Defense via Integration of Multiple Dispersed Low Curvature Models",
    "kap": "Learning Robust Kernel Ensembles with Kernel Average Pooling",
    "smd": "Saliency Diversified Deep Ensemble for Robustness to Adversaries",
}
"""Title of each paper by its id."""

FLAGS = ("impossible", "suspicious", "conflicting", "inferred")
"""What may be wrong with a number: it cannot be true; it is hardly what it is called; the paper says something else elsewhere;
something that it needs is not stated, and was inferred. A number has the first that applies; remark and note say why."""

COLUMNS = {
    "file": "stem of the CSV file, e.g. cear_table1",
    "paper": "a key of PAPERS",
    "table": 'its number as printed, or "text"',
    "dataset": "a name of bench.data.DATASETS",
    "architecture": "of a member, or of the single network",
    "defense": "a registered defense",
    "members": "networks of the ensemble, 1 for a single network",
    "eat": "whether trained on adversarial images of held-out ensembles, too: 0 or 1",
    "noise": "standard deviation of the noise in training (KAP)",
    "sigma": "standard deviation of the noise in certification",
    "metric": "clean_accuracy, robust_accuracy, certified_accuracy, attack_success_rate, tsr (EDLCM), a time, or nothing",
    "threat": "whitebox, blackbox, transfer (crafted on one network, tried on another), certified",
    "norm": "l2 or linf",
    "attack": "a name of attacks.ATTACKS",
    "source": 'where images of black-box attacks come from: a defense, or "itself" for the same one trained again',
    "place": "where noise was added to finished images: none, input, activations, both (KAP, table 2)",
    "eps": "strength of the attack, pixels in [0,1]",
    "radius": "certified, in l2",
    "value": "the number; nothing where a table prints deviations",
    "std": "its deviation, over what the paper says",
    "printed": "the number as it is printed",
    "printed_std": "its deviation as it is printed",
    "unit": "percent, percent_summed, seconds, milliseconds_per_batch, attack_steps; gain_points, ... for figures of the text",
    "flag": "one of FLAGS, or nothing",
    "remark": "why it is impossible, suspicious or conflicting; parts end with a semicolon",
    "note": "what was inferred, and what else must be known; parts end with a semicolon",
}
"""Of :func:`frame`, in order. Texts are "" and numbers NaN where they do not apply or the paper does not say."""

NUMBERS = ("members", "eat", "noise", "sigma", "eps", "radius", "value", "std")

LOWER_IS_BETTER = ("attack_success_rate", "tsr", "epoch_seconds", "runtime_seconds", "inference_ms")


@cache
def frame() -> pd.DataFrame:
    """Every published number, columns :data:`COLUMNS`, in the order of the files and within them of the print.

    Raises:
        ValueError: for a file with other columns, or a flag that does not exist; names the file.
    """
    return pd.concat([_read(path) for path in sorted(PUBLISHED.glob("*.csv"))], ignore_index=True)[list(COLUMNS)]


def _read(path: Path) -> pd.DataFrame:
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    strange = sorted(set(map(str, rows)) ^ (set(COLUMNS) - {"file", "printed", "printed_std"}))
    if strange:
        raise ValueError(f"{path.name}: columns differ from what is documented: {', '.join(strange)}")
    strange = sorted(set(rows.flag) - {"", *FLAGS})
    if strange:
        raise ValueError(f"{path.name}: unknown flag {', '.join(strange)}; known are {', '.join(FLAGS)}")
    rows = rows.assign(file=path.stem, printed=rows.value.where(rows.value != "", rows["std"]), printed_std=rows["std"])
    return rows.assign(**{name: pd.to_numeric(rows[name]).astype(float) for name in NUMBERS})


def known(**facts: Any) -> pd.DataFrame:
    """Published numbers with all of some facts, by column; None asks that a paper states nothing. Settings of attacks,
    deviations without means, and figures of the text other than times are not among them.

    Raises:
        KeyError: for a fact that is no column.
    """
    rows = frame()
    rows = rows[rows.value.notna() & (rows.metric != "") & rows.unit.isin(["percent", "percent_summed", "seconds"])]
    for name, wanted in facts.items():
        own = rows[name]
        if wanted is None:
            rows = rows[own.isna() | (own == "")]
        else:
            rows = rows[(own - wanted).abs() < 1e-9] if name in NUMBERS else rows[own == wanted]
    return rows


def best(**facts: Any) -> pd.Series | None:
    """The best of :func:`known` numbers, of one metric, that are not impossible; None if there is none.

    For a defense's own published value ask for the defense, too; without it, it is the best of all papers.

    Raises:
        ValueError: if several metrics are among them.
    """
    rows = known(**facts)
    rows = rows[rows.flag != "impossible"]
    metrics = sorted(set(rows.metric))
    if len(metrics) > 1:
        raise ValueError(f"best: numbers of several metrics, give one of {', '.join(metrics)}")
    if rows.empty:
        return None
    place = rows.value.argmin() if metrics[0] in LOWER_IS_BETTER else rows.value.argmax()
    return rows.iloc[int(place)]
