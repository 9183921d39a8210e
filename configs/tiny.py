"""A few million parameters on the bundled text: three minutes on two CPU cores.

    python train.py --config=configs/tiny.py --workdir=runs/tiny

`configs/tiny.py:full` and `configs/tiny.py:nsa` (any arm of `configs/arms.py`) train the models it
is compared with.
"""

from ml_collections import ConfigDict

from configs import arms, base

MLP_SIZES = {
    "asa": 688,
    "asa_latent_per_head": 688,
    "asa_one_query": 688,
    "full": 704,
    "mla": 664,
    "sliding": 704,
    "nsa": 528,
    "nsa_shared": 696,
    # Its learned summaries of blocks are a quarter of so small a model: not matched.
    "nsa_paper": 576,
    "nsa_no_window": 616,
    "nsa_no_selection": 616,
    "nsa_no_compression": 704,
    "alternating": 656,
}


def get_config(arm: str = "asa") -> ConfigDict:
    config = base.get_config()
    config.model.update(
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "window_size": 128,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 48,
            "qk_rope_head_dim": 16,
            "v_head_dim": 64,
            "num_latent_groups": 2,
            "group_kv_lora_rank": 64,
            "num_selected_blocks": 16,
            "tie_embeddings": True,
            "compute_dtype": "float32",
            "remat": "none",
            "scan_layers": False,
        }
    )
    config.data.update({"sources": ("tokens/bundled",), "sequence_length": 512, "batch_size": 8})
    config.optimizer.update(
        {
            "name": "muon",
            "learning_rate": 0.01,
            "adam_learning_rate": 3e-3,
            "schedule": "wsd",
            "decay_fraction": 0.4,
            "warmup_steps": 10,
        }
    )
    config.training.update(
        {
            "steps": 110,
            "eval_every_steps": 55,
            "eval_batches": 8,
            "checkpoint_every_steps": 55,
            "loss_chunk_tokens": 512,
        }
    )
    config.evaluation.update(
        {
            # Twice the training length shows how far the model extrapolates.
            "lengths": (512, 1024),
            "depths": (0.0, 0.5, 1.0),
            "samples": 2,
            "batch_tokens": 4096,
            "perplexity_tokens": 65536,
            "position_bucket_tokens": 128,
        }
    )
    return arms.set_arm(config, arm, num_layers=4, mlp_sizes=MLP_SIZES)
