"""The node agent: a kubelet for local processes. It turns pods bound to our virtual nodes into running processes.

Front door: :class:`agent.NodeAgent`. A pod is a *slot* (`slots`): one loopback address, one directory, one /dev/shm.
Containers run under a tiny supervisor (`shim`), so they survive the agent; `bubblewrap` and `plain` are the two ways
to start them behind one contract (`runtime`). Services and names live in `baton.cluster.services`; which node a pod
goes to is the scheduler's affair.
"""
