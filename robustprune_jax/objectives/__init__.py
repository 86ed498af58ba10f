"""Robust objectives. OBJECTIVES maps a name to (config) -> Objective."""

from robustprune_jax.objectives.crown_ibp import crown_ibp
from robustprune_jax.objectives.free import free
from robustprune_jax.objectives.ibp import ibp
from robustprune_jax.objectives.mixtrain import mixtrain
from robustprune_jax.objectives.natural import natural
from robustprune_jax.objectives.objective import Objective, Progress
from robustprune_jax.objectives.pgd import pgd
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
}

__all__ = ['OBJECTIVES', 'Objective', 'Progress']
