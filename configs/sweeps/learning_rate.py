"""Learning rates, a factor of about two apart, of two optimizers: RMSProp has momentum here, which AdamW has not.

python -m launch.sweep --sweep=configs/sweeps/learning_rate.py --workdir=runs/rates
"""

CONFIG = "configs/emoji.py"
SERIES = ("config.optimizer.name",)


def get_hyper(hyper):
    name, rate = "config.optimizer.name", "config.optimizer.learning_rate"
    return hyper.chainit(
        [
            hyper.product([hyper.fixed(name, "rmsprop"), hyper.sweep(rate, [5e-5, 1e-4, 2e-4])]),
            hyper.product([hyper.fixed(name, "adamw"), hyper.sweep(rate, [5e-4, 1e-3, 2e-3])]),
        ]
    )
