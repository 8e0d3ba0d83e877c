"""The benchmark: `python -m tests.bench`. Not part of the test run, because a time is no pass or fail.

    old_way.py     the old tool's U-NET way, to be measured against
    measure.py     clock, counter of U-Net samples, the course of a run, where the time of a step goes
    compare.py     every way on the same prompts and seeds: error over seconds and U-Net samples
    cost.py        what one step costs and where, also on a full-size model
    full_size.py   a model of Stable Diffusion 1's size with random weights, for cost.py
    __main__.py    arguments, tables, JSON

Compare only figures of one run: the machine, and what else it is doing, changes them all alike.
"""
