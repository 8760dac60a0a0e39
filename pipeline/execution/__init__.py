"""The run on Ray: the only home of `import ray`.

    stages        the config becomes the options of both stages; prepare checks what can be checked before Ray starts
    placement     how many actors of which size fit the nodes (plain arithmetic)
    cluster       joining or starting Ray, its nodes, the job's output
    dataset       the two stages on Ray Data;  actors: the stages as Ray actors
    supervision   which rows are inside which actor; rows that kill or hang their actor
    run           a prepared job from its first row to its part files;  progress, telemetry, profile: what is seen of it

Knows how rows reach the stages and the run folder; not what happens inside a stage.
"""
