"""Every field of a run, once, with the value that the 340M models share; other configs override."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    return ConfigDict(
        {
            "model": {
                "vocab_size": 32000,
                "hidden_size": 1024,
                "mlp_size": 2816,
                "layer_kinds": ("full",) * 24,
                "num_heads": 16,
                # full, sliding, nsa
                "num_kv_heads": 4,
                "head_dim": 64,
                "qk_norm": False,
                "attention_bias": False,
                # sliding, local, nsa
                "window_size": 512,
                # mla, local, global
                "kv_lora_rank": 256,
                "q_lora_rank": 0,
                "qk_nope_head_dim": 64,
                "qk_rope_head_dim": 32,
                "v_head_dim": 64,
                # A fit of a full-attention model to latents is exact only without.
                "latent_norm": True,
                "latent_norm_epsilon": 1e-6,
                # global
                "num_latent_groups": 2,
                "group_kv_lora_rank": 128,
                # global, nsa
                "compression_block_size": 16,
                "compression_stride": 16,
                "selection_block_size": 16,
                "num_selected_blocks": 64,
                "queries_per_selection": 4,
                # nsa
                "nsa_branches": ("compression", "selection", "window"),
                "nsa_share_kv": False,
                "nsa_compression": "mean",
                # all kinds
                "mlp_bias": False,
                # Every MLP is dense where num_experts is 0.
                "experts": {
                    "num_experts": 0,
                    "num_experts_per_token": 8,
                    "expert_size": 512,
                    "num_shared_experts": 1,
                    "num_dense_layers": 1,
                    "num_groups": 1,
                    "num_selected_groups": 1,
                    "scoring": "sigmoid",
                    "normalize": True,
                    "routed_scale": 1.0,
                },
                "rope_theta": 10000.0,
                "rope_scaling": {
                    "kind": "none",
                    "factor": 1.0,
                    "original_length": 8192,
                    # llama3
                    "low_frequency_factor": 1.0,
                    "high_frequency_factor": 4.0,
                    # yarn
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                    "truncate": True,
                    "attention_factor": 1.0,
                    "score_factor": 1.0,
                },
                "norm_epsilon": 1e-6,
                "init_stddev": 0.02,
                "tie_embeddings": False,
                "compute_dtype": "bfloat16",
                "attention_implementation": "auto",
                # What the backward pass computes anew: none; all but products with weights and
                # attention (dots); all but attention; full.
                "remat": "full",
                "scan_layers": True,
            },
            "data": {
                "sources": ("tokens",),
                "weights": (1.0,),
                "sequence_length": 8192,
                "batch_size": 64,
                "seed": 0,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 3e-4,
                # With Muon: the rate of what is not a matrix (embeddings, norms).
                "adam_learning_rate": 3e-4,
                "final_learning_rate_ratio": 0.1,
                "schedule": "cosine",
                "warmup_steps": 1024,
                # With the wsd schedule: the share of steps that decay at the end.
                "decay_fraction": 0.2,
                "b1": 0.9,
                "b2": 0.95,
                "epsilon": 1e-8,
                "weight_decay": 0.1,
                "clip_norm": 1.0,
                # Parts of a batch, one after another; 0: as few as leave a device no more than
                # device_tokens tokens, or one row.
                "accumulation_steps": 0,
                "device_tokens": 65536,
            },
            "training": {
                "steps": 28_600,
                "seed": 0,
                "log_every_steps": 10,
                "eval_every_steps": 1000,
                "eval_batches": 16,
                "checkpoint_every_steps": 500,
                "keep_checkpoints": 3,
                # A step is skipped where loss or gradient are not finite, or where the gradient
                # norm is this many times its running average (0: never); so many in a row stop
                # the run.
                "spike_factor": 10.0,
                "max_skipped_steps": 10,
                "loss_chunk_tokens": 2048,
                # Metrics also go to this project of Weights & Biases; '': they do not.
                "wandb_project": "",
                # 0 steps: no profile is taken.
                "profile_start_step": 10,
                "profile_steps": 0,
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1, "context": 1},
            "evaluation": {
                "tasks": (
                    "perplexity",
                    "single_noise",
                    "single_text",
                    "single_word",
                    "single_uuid",
                    "multi_key",
                    "multi_value",
                    "multi_query",
                    "variable_tracking",
                    "frequent_words",
                    "associative_recall",
                    "key_value",
                ),
                "lengths": (1024, 2048, 4096, 8192),
                "depths": (0.0, 0.25, 0.5, 0.75, 1.0),
                # Of each length and depth; results to publish take 500.
                "samples": 50,
                "batch_tokens": 65536,
                "perplexity_tokens": 2**21,
                "position_bucket_tokens": 1024,
                "seed": 0,
            },
            # A run directory or a model folder that step 0 takes its parameters from.
            "init_from": "",
        }
    )
