"""Adversarial attacks: maths only, knows torch and nothing of this project."""

from attacks.all_steps import AllSteps
from attacks.apgd import Apgd, ApgdT
from attacks.api import Attack, AttackResult
from attacks.autoattack import AutoAttack
from attacks.eot import Eot
from attacks.fab import Fab, FabT
from attacks.gradient import Bim, Fgsm, Mim, Pgd, RFgsm, ascend
from attacks.input_diversity import DiverseMim
from attacks.minimum_norm import Ddn, Fmn
from attacks.oracle import ContractError
from attacks.square import Square
from attacks.streams import Streams, drawing

ATTACKS: dict[str, type[Attack]] = {
    "autoattack": AutoAttack,
    "apgd": Apgd,
    "apgd_t": ApgdT,
    "fab": Fab,
    "fab_t": FabT,
    "square": Square,
    "pgd": Pgd,
    "fgsm": Fgsm,
    "r_fgsm": RFgsm,
    "bim": Bim,
    "mim": Mim,
    "diverse_mim": DiverseMim,
    "ddn": Ddn,
    "fmn": Fmn,
}
"""Attacks by the name that suites and the command line use."""

__all__ = [
    "ATTACKS",
    "AllSteps",
    "Apgd",
    "ApgdT",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Bim",
    "ContractError",
    "Ddn",
    "DiverseMim",
    "Eot",
    "Fab",
    "FabT",
    "Fgsm",
    "Fmn",
    "Mim",
    "Pgd",
    "RFgsm",
    "Square",
    "Streams",
    "ascend",
    "drawing",
]
