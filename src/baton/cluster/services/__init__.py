"""Services on one machine: loopback addresses, a TCP proxy over ready endpoints, and the lines of hosts files.

Front door: :class:`agent.ServiceAgent`. `names` is pure. Which pods a Service selects is written by the endpoints
controller; pods and their addresses are the node agent's.
"""
