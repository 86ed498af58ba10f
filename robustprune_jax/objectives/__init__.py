"""Robust objectives. OBJECTIVES maps a name to (config) -> Objective."""

from robustprune_jax.objectives.crown_ibp import crown_ibp
from robustprune_jax.objectives.expressive import cc_ibp, exp_ibp, mtl_ibp
from robustprune_jax.objectives.free import free
from robustprune_jax.objectives.ibp import ibp
from robustprune_jax.objectives.mixtrain import mixtrain
from robustprune_jax.objectives.natural import natural
from robustprune_jax.objectives.objective import Objective, Progress
from robustprune_jax.objectives.pgd import pgd
from robustprune_jax.objectives.sabr import sabr
from robustprune_jax.objectives.smooth import smooth
from robustprune_jax.objectives.trades import trades

OBJECTIVES = {
    'natural': natural,
    'pgd': pgd,
    'trades': trades,
    'free': free,
    'smooth': smooth,
    'ibp': ibp,
    'crown_ibp': crown_ibp,
    'mixtrain': mixtrain,
    'mtl_ibp': mtl_ibp,
    'cc_ibp': cc_ibp,
    'exp_ibp': exp_ibp,
    'sabr': sabr,
}

__all__ = ['OBJECTIVES', 'Objective', 'Progress']
