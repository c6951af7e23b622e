"""Adversarial attacks: maths only, knows torch and nothing of this project."""

from attacks.api import Attack, AttackResult, ContractError
from attacks.eot import Eot
from attacks.gradient import Bim, Fgsm, Mim, Pgd, RFgsm, ascend
from attacks.streams import Streams, drawing

ATTACKS: dict[str, type[Attack]] = {"fgsm": Fgsm, "r_fgsm": RFgsm, "bim": Bim, "pgd": Pgd, "mim": Mim}
"""Attacks by the name that suites and the command line use."""

__all__ = [
    "ATTACKS",
    "Attack",
    "AttackResult",
    "Bim",
    "ContractError",
    "Eot",
    "Fgsm",
    "Mim",
    "Pgd",
    "RFgsm",
    "Streams",
    "ascend",
    "drawing",
]
