"""Operations on tensors: sums over neighbours, exact products, C++ kernels, compiled graphs. No physics."""
