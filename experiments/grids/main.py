"""The comparison: nine arms of 45M parameters, 150M tokens at a context of 8k.

python -m experiments.compare --grid=experiments/grids/main.py --output=runs/comparison

Needs the token folders of docs/data.md and Hopper GPUs.
"""

from experiments.grid import Grid, Training

THREE_SEEDS = ("45m/full", "45m/nsa", "45m/asa")
ONE_SEED = (
    "45m/sliding",
    "45m/alternating",
    "45m/asa_one_query",
    "45m/asa_latent_per_head",
    "45m/nsa_no_window",
    "45m/nsa_no_selection",
)
TASKS = "single_noise,single_text,single_word,single_uuid,multi_key,associative_recall,key_value"

GRID = Grid(
    config="configs/comparison.py:{model}",
    seeds={model: (0, 1, 2) for model in THREE_SEEDS} | {model: (0,) for model in ONE_SEED},
    baseline="45m/full",
    sources=("tokens/long/code", "tokens/long/docs", "tokens/long/books"),
    weights=(0.5, 0.4, 0.1),
    learning_rates=(1e-3, 2e-3, 4e-3),
    sweep=Training(
        settings={
            "training.steps": 100,
            "training.eval_every_steps": 100,
            "training.checkpoint_every_steps": 100,
            "optimizer.warmup_steps": 33,
        }
    ),
    evaluation={"tasks": "perplexity", "lengths": "8192", "perplexity_tokens": 2**21},
    copying={"length": 8192, "windows": 256},
    selection={"length": 8192, "windows": 16},
    selecting=("45m/nsa", "45m/asa", "45m/asa_one_query"),
    fine_tuning=Training(
        settings={
            "training.steps": 200,
            "training.eval_every_steps": 100,
            "training.checkpoint_every_steps": 100,
            "optimizer.learning_rate": 5e-4,
            "optimizer.warmup_steps": 20,
        }
    ),
    tasks={"tasks": TASKS, "samples": 8000, "min_length": 256, "max_length": 8192},
    retrieval={
        "tasks": TASKS,
        "lengths": "1024,2048,4096,8192",
        "depths": "0,0.25,0.5,0.75,1",
        "samples": 50,
    },
    continuation=Training(
        settings={
            "data.sequence_length": 32768,
            "data.batch_size": 4,
            "training.steps": 150,
            "training.eval_every_steps": 150,
            "training.checkpoint_every_steps": 150,
            "optimizer.learning_rate": 5e-4,
            "optimizer.warmup_steps": 20,
        }
    ),
    continued=THREE_SEEDS,
    long_evaluation={"tasks": "perplexity", "lengths": "32768", "perplexity_tokens": 2**21},
    speed={},
    decode_lengths=(8192, 32768),
)
