"""Small C kernels for CPUs with AVX512-BF16: `build` compiles them, `native` calls them, csrc/ holds them."""
