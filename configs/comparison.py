"""The models of the comparison (docs/comparison.md): equal parameters, tokens and order of data.

    python train.py --config=configs/comparison.py:45m/asa --workdir=runs/asa_45m

`python -m experiments.compare` trains and measures all of them. Heads, latents, window and blocks
are those of the 340M models, since the context is the same: width and depth alone are scaled. Sizes
count parameters without the embedding, which is tied. Arms are those of `configs/arms.py`
but for `nsa_paper`, whose blocks of 64 would pack documents otherwise.
"""

from ml_collections import ConfigDict

from configs import arms, base

# Width, layers, and the width of the MLP by arm, so that all arms have equally many parameters.
SIZES = {
    "15m": (320, 8, {
        "asa": 576, "asa_latent_per_head": 544, "asa_one_query": 576, "full": 1088, "mla": 448,
        "sliding": 1088, "nsa": 736, "nsa_shared": 1088, "nsa_no_window": 896,
        "nsa_no_selection": 896, "nsa_no_compression": 1088, "alternating": 992,
    }),
    "45m": (512, 12, {
        "asa": 1248, "asa_latent_per_head": 1184, "asa_one_query": 1248, "full": 1600,
        "mla": 1152, "sliding": 1600, "nsa": 1248, "nsa_shared": 1600,
        "nsa_no_window": 1408, "nsa_no_selection": 1408, "nsa_no_compression": 1600,
        "alternating": 1504,
    }),
    "110m": (768, 16, {
        "asa": 1760, "asa_latent_per_head": 1728, "asa_one_query": 1760, "full": 2048,
        "mla": 1728, "sliding": 2048, "nsa": 1696, "nsa_shared": 2048,
        "nsa_no_window": 1856, "nsa_no_selection": 1856, "nsa_no_compression": 2048,
        "alternating": 1952,
    }),
}  # fmt: skip


def get_config(size_and_arm: str = "45m/asa") -> ConfigDict:
    size, _, arm = size_and_arm.partition("/")
    if size not in SIZES:
        raise ValueError(f"size '{size}': must be one of {', '.join(SIZES)}")
    hidden_size, num_layers, mlp_sizes = SIZES[size]
    config = base.get_config()
    config.model.update(
        {
            # Of the tokenizer that docs/data.md trains on the corpus.
            "vocab_size": 32768,
            "hidden_size": hidden_size,
            "tie_embeddings": True,
            "remat": "none",
            "scan_layers": False,
        }
    )
    config.data.update(
        {
            "sources": ("tokens/long/code", "tokens/long/docs", "tokens/long/books"),
            "weights": (0.5, 0.4, 0.1),
            "batch_size": 16,
        }
    )
    config.optimizer.update({"learning_rate": 2e-3, "warmup_steps": 100})
    config.training.update(
        {
            "steps": 1170,  # 150M tokens beside what pads rows
            "eval_every_steps": 234,
            "eval_batches": 8,
            "checkpoint_every_steps": 117,
            "keep_checkpoints": 2,
        }
    )
    return arms.set_arm(config, arm, num_layers=num_layers, mlp_sizes=mlp_sizes)
