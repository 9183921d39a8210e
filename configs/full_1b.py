"""The 1.3B baseline with full grouped-query attention; see `configs/asa_1b.py`.

python train.py --config=configs/full_1b.py --workdir=runs/full_1b
"""

from ml_collections import ConfigDict

from configs import asa_1b


def get_config() -> ConfigDict:
    return asa_1b.get_config("full")
