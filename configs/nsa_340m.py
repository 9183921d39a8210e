"""The 340M baseline with NSA at ASA's block size and token budget; see `configs/asa_340m.py`.

python train.py --config=configs/nsa_340m.py --workdir=runs/nsa_340m
"""

from ml_collections import ConfigDict

from configs import asa_340m


def get_config() -> ConfigDict:
    return asa_340m.get_config("nsa")
