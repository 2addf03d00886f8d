"""The RoleBasedGroup controller, in pieces: `group` (one pass), `roles`, `pod_template`, `discovery`, `services`, `status`.

Front door: :data:`group.CONTROLLER`. It knows v1alpha2 only and works on pods directly, without StatefulSets in between.
"""
