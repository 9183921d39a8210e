"""The 340M baseline with full grouped-query attention; see `configs/asa_340m.py`.

python train.py --config=configs/full_340m.py --workdir=runs/full_340m
"""

from ml_collections import ConfigDict

from configs import asa_340m


def get_config() -> ConfigDict:
    return asa_340m.get_config("full")
