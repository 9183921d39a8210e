"""Every stage of the comparison with tiny models: four minutes of CPU time, most of it compiling.

python -m experiments.compare --grid=experiments/grids/smoke.py --output=runs/smoke --gpu=0,1

Needs `make tokens`. What it measures means nothing. Without a GPU `--gpu=0,1` is two at a time.
"""

from experiments.grid import Grid, Training

STEPS = {"training.steps": 4, "training.eval_every_steps": 4, "training.checkpoint_every_steps": 2}

GRID = Grid(
    config="configs/tiny.py:{model}",
    seeds={"full": (0,), "asa": (0,)},
    baseline="full",
    sources=("tokens/bundled",),
    weights=(1.0,),
    settings=STEPS
    | {
        "model.num_heads": 2,
        "model.hidden_size": 64,
        "model.mlp_size": 64,
        "model.layer_kinds": ("full", "full"),
        "data.sequence_length": 256,
        "data.batch_size": 2,
        "training.eval_batches": 1,
        "optimizer.warmup_steps": 1,
    },
    model_settings={"asa": {"model.layer_kinds": ("local", "global")}},
    learning_rates=(5e-3, 1e-2),
    sweep=Training(settings=STEPS | {"training.steps": 2, "training.eval_every_steps": 2}),
    evaluation={"tasks": "perplexity", "lengths": "256", "perplexity_tokens": 2048},
    copying={"length": 1024, "windows": 4},
    selection={"length": 512, "windows": 2},
    selecting=("asa",),
    fine_tuning=Training(settings={"training.steps": 2, "training.eval_every_steps": 2}),
    tasks={"tasks": "single_noise", "samples": 20, "min_length": 128, "max_length": 256},
    retrieval={"tasks": "single_noise", "lengths": "128,256", "depths": "0,1", "samples": 2},
    continuation=Training(settings={"training.steps": 2, "data.sequence_length": 512}),
    continued=("asa",),
    long_evaluation={"tasks": "perplexity", "lengths": "512", "perplexity_tokens": 2048},
    speed={},
    decode_lengths=(256,),
)
