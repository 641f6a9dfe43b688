"""How many experts, and how many of them a token meets on average.

    python -m launch.sweep --sweep=configs/sweeps/experts.py --workdir=runs/experts
    python -m launch.sweep --sweep=configs/sweeps/experts.py --config=configs/ec_dit.py:XL-8E \
        --config.data.placeholder_ok=True --config.text.frozen_random_ok=True --backend=jobset \
        --accelerator=v5p-128 --workdir=gs://BUCKET/experts --dry-run --out=jobs

(With --skip-plan it does not compile each point's step.)
"""

CONFIG = "configs/emoji.py"
SERIES = ("config.model.capacity_factor",)


def get_hyper(hyper):
    return hyper.product(
        [
            hyper.sweep("config.model.num_experts", [8, 16, 32]),
            hyper.sweep("config.model.capacity_factor", [1.0, 2.0]),
        ]
    )
