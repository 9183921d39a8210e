"""1.3B parameters, 100B tokens at a context of 8192, the size of the ASA paper's larger model.

    python train.py --config=configs/asa_1b.py --workdir=runs/asa_1b --config.mesh.fsdp=8 \
        --config.data.sources="('tokens/slimpajama',)"

`configs/asa_1b.py:full` (or nsa, sliding, ...: `configs/arms.py`) trains another arm with the same
data and as many parameters (within 1%, by the width of the MLP). Needs several GPUs; not yet
trained to the end by this project, so no loss is promised here.
"""

from ml_collections import ConfigDict

from configs import arms, base

MLP_SIZES = {
    "asa": 5184,
    "asa_latent_per_head": 5120,
    "asa_one_query": 5184,
    "full": 5632,
    "mla": 5120,
    "sliding": 5632,
    "nsa": 4928,
    "nsa_shared": 5632,
    "nsa_paper": 4736,
    "nsa_no_window": 5248,
    "nsa_no_selection": 5248,
    "nsa_no_compression": 5632,
    "alternating": 5440,
}


def get_config(arm: str = "asa") -> ConfigDict:
    config = base.get_config()
    config.model.update(
        {
            "hidden_size": 2048,
            "head_dim": 128,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "group_kv_lora_rank": 256,
        }
    )
    config.data.batch_size = 256
    config.training.steps = 47_700
    return arms.set_arm(config, arm, num_layers=24, mlp_sizes=MLP_SIZES)
