"""Attention backends behind one interface (`base`): `torch_native` for any device, `cpu` for bf16 by C kernels."""
