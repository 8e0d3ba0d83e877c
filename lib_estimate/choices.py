"""What the menus offer: the names of optimizers, losses and schedules, each with one line of help.

Standard library only, so that a request can be read and checked without torch; `registry.py` has what each name does.
"""

from __future__ import annotations

OPTIMIZER_HELP: dict[str, str] = {
    "Adam": "a good first choice: every number moves at its own pace",
    "AdamW": "Adam that also draws the vectors gently towards zero, so they don't grow longer than they need to",
    "SGD": "plain steps downhill with momentum; slower, and its learning rate needs care",
    "RMSprop": "like Adam without momentum; quick, a little restless",
    "NAdam": "Adam that looks one step ahead; often a little quicker",
    "RAdam": "Adam with a careful start; needs no warm-up",
    "Adagrad": "steps that only get shorter; calm, slow towards the end",
    "Adadelta": "finds its own step length from how far it came before; the learning rate only scales it",
    "Adamax": "Adam that goes by the largest recent gradient; steadier when a few gradients stand out",
    "Rprop": "uses only the direction of the gradient and its own step lengths: only the first learning rate counts, "
    "schedules don't. Best for the transformer part, where every step sees the same loss",
    "ASGD": "plain steps downhill without momentum, getting a little shorter; its learning rate needs care",
    "LBFGS": "learns the shape of the valley: few long steps of several evaluations each, always on the same samples",
    "Lion": "steps of one size, only the direction is learnt; needs the package lion-pytorch",
    "Prodigy": "Adam that finds its own learning rate: leave that at 1; needs the package prodigyopt",
}

LOSS_HELP: dict[str, str] = {
    "MSE": "mean of the squared differences: large differences count most",
    "L1": "mean of the absolute differences: large and small ones count alike",
    "SmoothL1": "L1, but smooth for differences below 0.1",
    "Huber": "MSE, but a difference above 1 counts as in L1, so outliers don't rule",
    "cosine": "the angle between the two: direction only, a result of the wrong strength counts as a match",
}

SCHEDULE_HELP: dict[str, str] = {
    "constant": "stays as given",
    "cosine": "falls to zero over the run, slowly at first and at the end",
    "linear": "falls to zero over the run in a straight line",
}

OPTIMIZERS: tuple[str, ...] = tuple(OPTIMIZER_HELP)
LOSSES: tuple[str, ...] = tuple(LOSS_HELP)
SCHEDULES: tuple[str, ...] = tuple(SCHEDULE_HELP)
