"""What a job will need, before it runs: rows, errors, tokens, bytes, time and cost, from a sample of its rows.

    plan      the plan of a job: what to sample, which hardware, what to compute
    survey    sampled rows as the run will see them, by media headers alone
    probe     both stages on this machine for half a minute
    sample    figures of the whole manifest from the sample, each with its 95 % range
    roofline  arithmetic and memory traffic of the model; data sheets of GPUs
    forecast  time, cost, bottleneck and room in the object store;  advice: settings worth changing
    page      the plan on the terminal

Knows the stages' options and the steps they consist of; not Ray, and nothing is decoded or written except by the probe.
"""
