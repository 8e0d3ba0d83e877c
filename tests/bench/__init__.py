"""The benchmark: `python -m tests.bench`. Not part of the test run, because a cost is no pass or fail.

    old_way.py     the old tool's U-NET way, to be measured against
    measure.py     counter of forward-equivalents, the course of a run, clock, where the time of a step goes
    compare.py     every way on the same prompts and seeds: the error left over forward-equivalents
    cost.py        what one step costs and where, also on a full-size model
    projection.py  what a whole estimate costs, from what it runs and what that costs
    full_size.py   models of Stable Diffusion 1's and XL's size with random weights
    memory.py      what each part needs on the card and calculates at full size, without such a machine
    predicts.py    which number predicts the finished picture
    __main__.py    arguments, tables, JSON

The unit is the U-Net forward-equivalent, one latent forward 1, with gradient 3: on a real checkpoint the U-Net is
nearly all of the cost, and a count is the same on every machine. Seconds are only what cost.py measures; compare those
of one run alone, as the machine, and what else it is doing, changes them all alike.
"""
