"""LeaderWorkerSet: groups of a leader and its workers that live, restart and are updated as one. Front door:
`leader_worker_set.CONTROLLER`.
"""
