"""The iteration level: the operation level's runs, to the nanosecond, at a cost that grows with decisions.

What a machine does between two decisions follows from a recurrence over a few times; here it is compiled. The
batcher's decisions are compiled as well: what runs is described by counts that a step changes in constant time, and
requests are touched when they are admitted, finish, or are preempted.
"""
