"""What the columns of a table mean, in words that a stranger understands."""

from __future__ import annotations

from collections.abc import Sequence

from bench.store import Record

OF_NUMBERS = {
    "robust_accuracy_8bit": "8 bit: the adversarial images rounded to 256 levels",
    "certificates_beaten": "beaten: share of attacked certificates that an l2 attack within their radius refutes",
    "median_distance": "median: distance of the nearest adversarial point, over the images that are right",
    "training_seconds_per_epoch": (
        "train s/epoch: seconds that the steps of a training epoch took, of all members, on a machine as busy as it was"
    ),
}
"""Of single numbers, wherever they occur."""

CERTIFIED = (
    "CA r: certified accuracy at l2 radius r",
    "an image counts if its class is right and its unrounded radius is at least r",
)

_OF_KINDS: dict[str, tuple[str, ...]] = {
    "certified accuracy": (
        "{how}",
        *CERTIFIED,
        "abstained: share of images without a certificate at the smallest radius",
        "draws: noise draws per image; networks: networks asked per image, selection counted",
    ),
    "estimators on the same votes": (
        "{how}, {numerics}",
        *CERTIFIED,
        "saved r: n over the mean draws of a run for that radius alone; saved: of one run for everything",
        "oracle: draws of a sequential test that knows each image's probability (Wald)",
        "phases: the last has 0.89 n draws, so that all fit into n",
    ),
    "variance view": (
        "{how}",
        "variance: of the class margin of the first k members' mean logits under noise, as a share of one member's mean",
        "zeta: correlation of the members' margins; fitted: the zeta whose (1 + zeta (k - 1)) / k is closest",
        "ACR: average certified radius of the first k members",
    ),
    "diversity of members": (
        "means over images as they are, but for distilled ones",
        "cosine: of the input gradients of two members' cross-entropy, mean over pairs; coherence: largest over pairs",
        "SMD: ln of the sum over pairs of exp(cosine of the gradients of the true class's logit)",
        "ln ED: log-determinant of the members' normalised probabilities of the wrong classes",
        "errors: correlation of two members' errors over images, mean over pairs",
        "gradient: l2 norm of the input gradient of cross-entropy, mean over members",
        "curvature: squared change of that gradient over a step h along its signs, over h^2, mean over members",
        "bend cosine: of two members' changes of the gradient over that step, mean over pairs",
        "distilled images: moved until what one member sees in a random layer is near what it sees in a partner image",
        "vulnerability: another member's cross-entropy on distilled images for the partner's class; high: it is not fooled",
        "distilled errors: percentage of distilled images that another member takes for another class than their own",
        "{how}",
    ),
    "transfer between members": (
        "images crafted by {how}",
        "an image that its source gets wrong as it is stays as it is; eps stands behind each name",
        "transfer: share that another member gets wrong when crafted on a member, mean over ordered pairs of members, "
        "of the images that all members get right",
        "TSR: the same as a percentage, summed over the other members and not averaged: 100 (members - 1) at most "
        "(EDLCM, eq. 12)",
        "TSR all: of all images; floor: the same sum without any attack, (members - 1) times the members' mean clean error",
        "ASR members: share that the ensemble gets wrong when crafted on a member, mean over members (CEAR, table 3); "
        "ASR white-box: when crafted on the ensemble itself; both of the images that the ensemble gets right",
        "an empty denominator leaves a hole",
    ),
    "accuracy on images of other models": (
        "adversarial images of models that each evaluation names, trained with other seeds; an image counts if the defense is "
        "right on all of them",
    ),
    "accuracy under noise": (
        "{how}",
        "none, input, activations, both: where Gaussian noise is added when an image is judged: nowhere, to the image, behind "
        "every convolution (and its pool, if it has one), in both places",
        "the class is that of the mean softmax over 100 fresh draws; one draw: share of right single draws of attacked images",
        "clean: images as they are; attacked: adversarial images crafted against the network without noise, finished before "
        "noise was added: what noise repairs there says nothing about an attacker who knows of the noise",
        "EOT: attacked through the noise, on the mean over draws of the noisy network, which is that attacker (autoattack: its "
        "version rand)",
        "noise_repairs: more than a tenth of the images that the attack broke, ten or more, are right again under noise",
    ),
    "activations under noise and attack": (
        "{how}",
        "change of a convolution's answers to an image over the answers themselves, both in l2 over channels and positions and "
        "behind the pool of the kernels, if there is one; mean over images that are right as they are",
        "noise: Gaussian, scaled to the largest l2 length that eps allows, not clipped",
        "attack: the adversarial image, or the highest loss where none was found",
        "first and last of the convolutions in the order in which they are asked",
    ),
    "kernels of the first layer": (
        "cosine of two kernels of the first convolution, mean over all pairs, and over neighbours on their sheet; kernels that "
        "are 0 do not count",
        "applied: what images are convolved with, means of kernels where a defense pools by mean; learned: before any pooling",
        "means over overlapping windows are alike by construction: neighbours with 3x3 windows share six of nine, 0.667 for "
        "kernels that have nothing in common",
        "of the network's weights: no image is used",
    ),
}


def of_kind(kind: str, how: str, records: Sequence[Record]) -> list[str]:
    """The sentences that a table of a kind needs; ``how`` its numbers were made."""
    numerics = sorted({record.eval["fields"].get("numerics") or "float32" for record in records})
    facts = {"how": how, "numerics": ", ".join(numerics)}
    return [sentence.format(**facts) for sentence in _OF_KINDS.get(kind, ())]
