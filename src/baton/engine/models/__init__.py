"""Model configurations and the decoder: `spec`, `decoder` (torch), `decoder_cpu` (C kernels), written once for all architectures."""
