"""The four main arms on 17M tokens each: what some eight minutes of one H100 can show.

python -m experiments.compare --grid=experiments/grids/short.py --output=runs/short --gpu=0,0

Two runs share the GPU, so that one compiles and starts while the other trains; speed is measured
alone. Too few tokens for retrieval, so only what a young model shows is measured first.
"""

from experiments.grid import Grid, Training

TASKS = "single_noise,associative_recall"

GRID = Grid(
    config="configs/comparison.py:{model}",
    seeds={model: (0,) for model in ("45m/full", "45m/nsa", "45m/asa", "45m/sliding")},
    baseline="45m/full",
    sources=("tokens/long/code", "tokens/long/docs", "tokens/long/books"),
    weights=(0.5, 0.4, 0.1),
    settings={
        "data.batch_size": 8,
        "training.steps": 260,
        "training.eval_every_steps": 130,
        "training.checkpoint_every_steps": 130,
        "optimizer.warmup_steps": 40,
    },
    learning_rates=(2e-3,),
    evaluation={"tasks": "perplexity", "lengths": "8192", "perplexity_tokens": 2**20},
    copying={"length": 8192, "windows": 64},
    speed={},
    decode_lengths=(8192, 32768),
    fine_tuning=Training(
        settings={
            "training.steps": 60,
            "training.eval_every_steps": 60,
            "training.checkpoint_every_steps": 60,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 10,
        }
    ),
    tasks={"tasks": TASKS, "samples": 4000, "min_length": 256, "max_length": 2048},
    retrieval={
        "tasks": TASKS,
        "lengths": "512,1024,2048",
        "depths": "0,0.5,1",
        "samples": 50,
    },
    by_stage=True,
)
