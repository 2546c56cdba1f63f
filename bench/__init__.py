"""How fast the machine is, in ratios and microseconds, and what it is held to.

`python -m bench` measures and prints a table and one last line of JSON; `--check` holds the numbers
to targets.toml. A file per subject: warm (loops that miss nothing), refill (misses of the TLB), faults
(VM exits and what follows, tracing), shadow (the same without EPT), hostops (what the host is asked for),
startup. Ratios are taken within one run, so that they hold on any machine; times are the best of several,
because machines are shared.

lab.py and bare.py are what is measured, code.py the guest code they run, timing.py the clock, report.py
the table.
"""
