"""The embedded default: scikit-learn's 1,797 digits at 28x28, TRADES, pruned to a tenth.

python main.py --config=configs/digits.py --workdir=runs/digits
"""

from ml_collections import ConfigDict

from robustprune_jax.config import default, with_argument


def get_config(arg: str = '') -> ConfigDict:
    return with_argument(default(), arg)
