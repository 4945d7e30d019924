"""Dispatch sweeps of runs to this machine or to SLURM, watch them and gather their results.

Layers, each importing only from those before it:

    tasks            what a job does, as plain data
    sweep, scores    a sweep's folder; which reference scores runs need
    cluster          the interface of a cluster
    slurm_commands, local_queue    what is running or waiting now, on SLURM and on this machine
    queues           both of these
    gather, watching, logs         tables and states of a sweep
    job              performs one task; supervisor runs the tasks of this machine
    slurm, local     the clusters
    profiles         from a launcher's configuration to a cluster
    grid, composing, dispatch      from a command line to submitted jobs
    __main__         python -m launchers VERB
"""
