"""Layer kinds, variants and mixtures whose caches are tested: layer_kinds and other fields."""

CASES = {
    "full": (("full",), {}),
    "mla": (("mla",), {"q_lora_rank": 16}),
    "sliding": (("sliding",), {}),
    "local": (("local",), {}),
    "global": (("global",), {}),
    "global_one_query_one_latent": (
        ("global",),
        {"queries_per_selection": 1, "num_latent_groups": 1},
    ),
    "nsa": (("nsa",), {}),
    "nsa_shared_mlp": (("nsa",), {"nsa_share_kv": True, "nsa_compression": "mlp"}),
    "nsa_overlapping_mlp": (
        ("nsa",),
        {"compression_stride": 4, "compression_block_size": 8, "nsa_compression": "mlp"},
    ),
    "nsa_no_selection": (("nsa",), {"nsa_branches": ("compression", "window")}),
    "nsa_no_compression": (("nsa",), {"nsa_branches": ("window",)}),
    "asa_scanned": (("local", "global") * 2, {"scan_layers": True}),
    "nsa_no_window": (("nsa",), {"nsa_branches": ("compression", "selection")}),
    "groups": (("sliding", "local") * 2, {"window_size": 40}),
    "no_period": (("full", "local", "full"), {"tie_embeddings": True}),
}
