"""A discrete-event simulator of workers and a router, which runs the product's own `core/` code.

What decides is real: the policies, the location index, the load ledger, the promoter. What costs
time is a model: prefill, decode, links and disks, with rates from published hardware or from
measured calibrations. Figures from here are simulated and say so.
"""
