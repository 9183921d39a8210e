"""340M parameters, 15B tokens at a context of 8192, the size of the ASA paper's smaller model.

    python train.py --config=configs/asa_340m.py --workdir=runs/asa_340m \
        --config.data.sources="('tokens/slimpajama',)"

`configs/asa_340m.py:full` (or nsa, sliding, ...: `configs/arms.py`) trains another arm with the
same data and as many parameters (within 1%, by the width of the MLP). Needs a GPU; not yet trained
to the end by this project, so no loss is promised here.
"""

from ml_collections import ConfigDict

from configs import arms, base

MLP_SIZES = {
    "asa": 2592,
    "asa_latent_per_head": 2560,
    "asa_one_query": 2592,
    "full": 2816,
    "mla": 2560,
    "sliding": 2816,
    "nsa": 2464,
    "nsa_shared": 2816,
    "nsa_paper": 2368,
    "nsa_no_window": 2624,
    "nsa_no_selection": 2624,
    "nsa_no_compression": 2816,
    "alternating": 2720,
}


def get_config(arm: str = "asa") -> ConfigDict:
    config = base.get_config()
    # Nothing is computed anew: an H100 holds all of 32,768 tokens (37 GiB), or a row of 65,536.
    config.model.update({"remat": "none", "scan_layers": False})
    config.optimizer.device_tokens = 32_768
    return arms.set_arm(config, arm, num_layers=24, mlp_sizes=MLP_SIZES)
