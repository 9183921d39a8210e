"""The arms that are compared: what each changes in the model, whatever its size.

`configs/asa_340m.py` and its like take an arm as `configs/asa_340m.py:sliding`.
"""

from ml_collections import ConfigDict

# Layer kinds of one period, and the fields that differ from an ASA model's.
ARMS = {
    "asa": (("local", "global"), {}),
    # ASA with one latent for each key/value head: reading (b) of the cache saving.
    "asa_latent_per_head": (("local", "global"), {}),
    "asa_one_query": (("local", "global"), {"queries_per_selection": 1}),
    "full": (("full",), {}),
    "mla": (("mla",), {}),
    "sliding": (("sliding",), {}),
    "nsa": (("nsa",), {}),
    "nsa_shared": (("nsa",), {"nsa_share_kv": True}),
    "nsa_paper": (
        ("nsa",),
        {
            "compression_block_size": 32,
            "compression_stride": 16,
            "selection_block_size": 64,
            "num_selected_blocks": 16,
            "queries_per_selection": 1,
            "nsa_compression": "mlp",
        },
    ),
    "nsa_no_window": (("nsa",), {"nsa_branches": ("compression", "selection")}),
    "nsa_no_selection": (("nsa",), {"nsa_branches": ("compression", "window")}),
    "nsa_no_compression": (("nsa",), {"nsa_branches": ("window",)}),
    # ASA's alternation without its latents.
    "alternating": (("sliding", "nsa"), {"nsa_branches": ("compression", "selection")}),
}


def set_arm(config: ConfigDict, arm: str, num_layers: int, mlp_sizes: dict[str, int]) -> ConfigDict:
    """Makes `config` the arm of `num_layers` layers.

    Args:
        config: a run whose model has the sizes of an ASA model.
        arm: a name of ARMS.
        num_layers: a multiple of the arm's period.
        mlp_sizes: width of the MLP by arm, so that all arms have equally many parameters.

    Returns:
        `config`, changed.

    Raises:
        ValueError: the arm is not known.
    """
    if arm not in mlp_sizes:
        raise ValueError(f"arm '{arm}': must be one of {', '.join(mlp_sizes)}")
    kinds, fields = ARMS[arm]
    model = config.model
    model.layer_kinds = kinds * (num_layers // len(kinds))
    model.mlp_size = mlp_sizes[arm]
    model.update(fields)
    if kinds == ("nsa",) and arm != "nsa_paper":
        # An ASA model has half as many layers that select, each with twice the blocks.
        model.num_selected_blocks //= 2
    if arm == "asa_latent_per_head":
        model.num_latent_groups = model.num_kv_heads
    return config
