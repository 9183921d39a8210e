"""The main arms at three sizes with as many tokens a parameter: for the fit of a power law.

python -m experiments.compare --grid=experiments/grids/scaling.py --output=runs/scaling

`python -m experiments.report` fits validation loss over parameters and extrapolates it to 340M.
"""

from experiments.grid import Grid, Training

SIZES = {"15m": 389, "45m": 1170, "110m": 2767}  # steps: 3.3 tokens a parameter
ARMS = ("full", "asa")

GRID = Grid(
    config="configs/comparison.py:{model}",
    seeds={f"{size}/{arm}": (0,) for arm in ARMS for size in SIZES},
    baseline="45m/full",
    sources=("tokens/long/code", "tokens/long/docs", "tokens/long/books"),
    weights=(0.5, 0.4, 0.1),
    model_settings={
        f"{size}/{arm}": {"training.steps": steps, "training.eval_every_steps": steps // 2}
        for arm in ARMS
        for size, steps in SIZES.items()
    },
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
)
