"""The 1.3B baseline with NSA at ASA's block size and token budget; see `configs/asa_1b.py`.

python train.py --config=configs/nsa_1b.py --workdir=runs/nsa_1b
"""

from ml_collections import ConfigDict

from configs import asa_1b


def get_config() -> ConfigDict:
    return asa_1b.get_config("nsa")
