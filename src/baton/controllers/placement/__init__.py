"""Which node a pod goes to. `place` decides about one pod, `scheduler` goes through all that wait.

Front door: :func:`place.place` and :data:`scheduler.CONTROLLER`. For clusters without kube-scheduler.
"""
