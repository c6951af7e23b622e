"""Which column of a summary a number belongs to, and what the column is called."""

from __future__ import annotations

from typing import Any

from bench.store import Metric, Record


def certificate(record: Record) -> str:
    """Estimator, n and alpha of a certified record, in words; empty for others."""
    fields = record.eval["fields"]
    if "estimator" not in fields:
        return ""
    numerics = f", {fields['numerics']}" if fields.get("numerics") else ""
    return f"{fields['estimator']} estimator, n0 = {fields['n0']}, n <= {fields['n']}, alpha = {fields['alpha']:g}{numerics}"


def crafted(record: Record) -> str:
    """How the images of a transfer record were made, in words."""
    fields = record.eval["fields"]
    words = {"proposals": "Square's proposals"} if fields["attack"] == "autoattack" else {}
    given = [f"{words.get(name, name)} {fields[name]}" for name in _SETTINGS if fields.get(name) not in (None, [], "native")]
    stops = {True: ["every search ends when its source is wrong"], False: ["all steps taken, also when the source is wrong"]}
    return ", ".join([fields["attack"], fields["norm"], *given, *stops.get(fields.get("early_stop"), [])])


def under_noise(record: Record) -> str:
    """Noise and attack of a record of accuracy under noise, in words."""
    fields = record.eval["fields"]
    eot = f", EOT with {fields['eot']} draws a gradient" if fields["eot"] else ""
    return f"sigma = {fields['sigma']:g}, {crafted(record)}{eot}"


_SETTINGS = ("version", "attacks", "steps", "step", "restarts", "loss", "start", "targets", "proposals", "engine")

_ORDER = (
    "clean",
    "robust",
    "certified",
    "challenge",
    "variance",
    "diversity",
    "votes",
    "transfer",
    "noise",
    "activations",
    "kernels",
)


def _rank(record: Record) -> int:
    kind = record.eval["fields"].get("kind", "")
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def key(record: Record, metric: Metric) -> tuple[Any, ...]:
    """Sort key of a number's column, () if the summary leaves it out."""
    fields, rank, name = record.eval["fields"], _rank(record), record.eval["name"]
    if fields.get("kind") in _KINDS:
        return _KINDS[fields["kind"]](rank, record, metric)
    if metric.metric in _PLAIN:
        place, word = _PLAIN[metric.metric]
        return (place, "", word, BARE)
    if metric.metric in _ROBUST and metric.denominator in ("all", None):
        return _robust_key(rank, record, metric)
    if metric.metric == "certified_accuracy":
        return (rank, name, "CA", metric.radius)
    if certificate(record) and metric.metric in _CERTIFIED:
        own = "" if metric.metric == "certificates_beaten" else name
        return (rank, own, _CERTIFIED[metric.metric], _at(metric))
    return ()


BARE = -1.0
"""Value of a column that is not one of several: its heading is its name."""


def _at(metric: Metric) -> float:
    """The radius that a number belongs to, if it does."""
    return BARE if metric.radius is None else metric.radius


_PLAIN = {"clean_accuracy": (0, "clean"), "training_seconds_per_epoch": (len(_ORDER), "train s/epoch")}

_ROBUST = {"robust_accuracy": "", "robust_accuracy_8bit": "8 bit", "median_distance": "median"}


def _robust_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """Accuracy at each eps, for the headline also of 8-bit images; of a search for the nearest point the median distance."""
    fields, what = record.eval["fields"], _ROBUST[metric.metric]
    nearest = bool(fields.get("nearest"))
    if nearest != (what == "median") or (what == "8 bit" and fields["attack"] != "autoattack"):
        return ()
    words = f"{record.eval['name']} {fields.get('norm', '')} {what}".strip()
    return (rank, "", words, metric.eps or BARE)


_CERTIFIED = {
    "abstention": "abstained",
    "certificates_beaten": "beaten",
    "acr": "acr",
    "draws_per_image": "draws",
    "evaluations_per_image": "networks",
}

_VOTES = {"certified_accuracy": "CA", "acr": "acr", "draws_saved": "saved"}


def _variance_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """Variance and ACR by members, ACR at the largest n; the figure has the rest."""
    name = record.eval["name"]
    if metric.metric == "margin_variance_ratio":
        return (rank, name, "variance, k =", metric.members)
    if metric.metric in _CORRELATIONS:
        return (rank, name, _CORRELATIONS[metric.metric], BARE)
    if metric.metric == "acr" and metric.draws == max(record.eval["fields"]["n"]):
        return (rank, name, "ACR, k =", metric.members)
    return ()


_CORRELATIONS = {"margin_correlation": "zeta", "margin_correlation_fitted": "zeta fitted"}


def _votes_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """Accuracies, and the factor of draws saved: at a radius of a run for that alone, else of one run for all."""
    return (rank, "", _VOTES[metric.metric], _at(metric)) if metric.metric in _VOTES else ()


def _diversity_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """A column each, in the order in which the caption explains them."""
    if metric.metric not in _DIVERSITY:
        return ()
    return (rank + list(_DIVERSITY).index(metric.metric) / 100, record.eval["name"], _DIVERSITY[metric.metric], BARE)


def steps(record: Record) -> str:
    """How far and how often the diversity of members moves images, in words."""
    fields = record.eval["fields"]
    distilled = min(fields["distilled"], fields["images"] // 10 * 10)
    return f"h = {fields['h']:g} in l2, {distilled} images distilled within {fields['eps']:g} in l_inf"


_DIVERSITY = {
    "gradient_cosine": "cosine",
    "gradient_coherence": "coherence",
    "saliency_alignment": "SMD",
    "log_diversity": "ln ED",
    "error_correlation": "errors",
    "gradient_norm": "gradient",
    "curvature": "curvature",
    "curvature_cosine": "bend cosine",
    "vulnerability_diversity": "vulnerability",
    "vulnerability_transfer": "distilled errors",
}


def _transfer_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """The averages, a column an eps, in the order in which the caption explains them; the figure has the matrix."""
    if metric.metric not in _TRANSFER:
        return ()
    order, at = list(_TRANSFER).index(metric.metric) / 100, BARE if metric.eps is None else metric.eps
    return (rank + order, record.eval["name"], _TRANSFER[metric.metric], at)


_TRANSFER = {
    "tsr_normalised": "transfer",
    "tsr": "TSR",
    "tsr_all": "TSR all",
    "tsr_floor": "floor",
    "asr_members": "ASR members",
    "asr_ensemble": "ASR white-box",
}


def _noise_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """Accuracies of all images, a column a place; of single draws those of attacked images. The record has the rest."""
    made = "clean" if metric.source is None else "attacked" if metric.source == "none" else "EOT"
    if metric.metric == "noisy_accuracy_single" and made == "attacked":
        made = "one draw"
    elif metric.metric != "noisy_accuracy" or metric.denominator != "all":
        return ()
    places = list(record.eval["fields"]["places"])
    order = 10 * ("clean", "attacked", "one draw", "EOT").index(made) + places.index(metric.target)
    name, eps = f"{made}, {metric.target}", metric.eps
    return (rank + order / 100, record.eval["name"], name if eps is None else f"{name}, eps", BARE if eps is None else eps)


def _activations_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """The first and the last layer; the figure has those between."""
    layers = list(dict.fromkeys(own.target for own in record.metrics if own.metric == "activation_change"))
    ends = {layers[0]: "first layer", layers[-1]: "last layer"}
    if metric.target not in ends:
        return ()
    name = f"{ends[metric.target]}, {metric.source}, eps"
    order = 2 * (metric.target == layers[-1]) + (metric.source == "attack")
    return (rank + order / 100, record.eval["name"], name, metric.eps)


def _kernels_key(rank: int, record: Record, metric: Metric) -> tuple[Any, ...]:
    """A column each: applied before learned ones, neighbours before all pairs."""
    order = 2 * (metric.source == "learned") + (metric.target == "all")
    words = {"neighbours": "neighbours", "all": "all pairs"}
    return (rank + order / 100, record.eval["name"], f"{metric.source}, {words[metric.target or 'all']}", BARE)


_KINDS = {
    "variance": _variance_key,
    "diversity": _diversity_key,
    "votes": _votes_key,
    "transfer": _transfer_key,
    "noise": _noise_key,
    "activations": _activations_key,
    "kernels": _kernels_key,
}
"""Evaluations with a table of their own."""


def heading(key: tuple[Any, ...], several: bool) -> str:
    """Text of a column; a certificate's evaluation is named where a table holds several."""
    _, evaluation, name, value = key
    text = name if value == BARE else f"{name} {short(value)}"
    return f"{evaluation} {text}" if evaluation and several else text


def short(value: float) -> str:
    """0.25 as it is, 0.0313725 as 8/255."""
    parts = round(value * 255)
    in_255ths = parts > 0 and abs(value * 255 - parts) < 1e-9 and len(f"{value:g}") > 6
    return f"{parts}/255" if in_255ths else f"{value:g}"
