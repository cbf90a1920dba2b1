"""C++ sources of the kernels, which `hydrazero.models.ops.kernels` compiles."""
