"""What the models need of a kernel's core.

sched.py: tasks on greenlets, the clock, wait queues. locks.py: the kernel's locks, with an order
check. costs.py: what events cost in logical time. errors.py: how the models say no.
"""
