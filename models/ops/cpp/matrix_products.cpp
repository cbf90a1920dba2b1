// Products of the 3 x 3 matrices that an atom holds for each feature, as coefficients of an orthonormal basis.
//
// The nine coefficients of a matrix X = M + v x are those of its trace, of its skew part (the matrix of the cross
// product with a vector v; y, z, x) and of the traceless part of its symmetric part M (xy, yz, zz, xz, xx - yy). Of two
// matrices, {X, X'} = X X' + X' X has the symmetric part {M, M'} + v v'^T + v' v^T - 2 v . v' and the vector
// (tr M - M) v' + (tr M' - M') v, which is much less work than products of nine numbers each.

#include "lanes.h"

namespace {

constexpr int kCoefficients = 9;
constexpr double kHalf = 0.70710678118654752, kThird = 0.57735026918962576, kSixth = 0.40824829046386302; // roots of

// A matrix for each of as many features as a native vector holds.
template <typename T> struct Matrices {
  using Lanes = Pack<T, kVectorBytes / sizeof(T)>;
  using Vector = typename Lanes::Vector;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  Vector xx, yy, zz, xy, yz, xz; // of the symmetric part
  Vector x, y, z;                // the vector of the skew part

  // From coefficients that lie `stride` numbers apart; a sign of -1 transposes.
  static INLINE Matrices load(const T *from, int64_t stride, T sign) {
    Vector c[kCoefficients];
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) c[i] = Lanes::load(from + i * stride).part[0];
    const T half = kHalf, third = kThird, sixth = kSixth, skew = sign * half;
    const Vector mean = third * c[0], along = sixth * c[6], across = half * c[8];
    return {mean - along + across, mean - along - across, mean + 2 * along, half * c[4], half * c[5], half * c[7],
            skew * c[3],           skew * c[1],           skew * c[2]};
  }

  INLINE void store(T *to, int64_t stride) const {
    const T half = kHalf, third = kThird, sixth = kSixth, twice = 2 * half;
    const Vector both = xx + yy;
    const Vector c[kCoefficients] = {third * (both + zz), twice * y,  twice * z,
                                     twice * x,           twice * xy, twice * yz,
                                     sixth * (2 * zz - both), twice * xz, half * (xx - yy)};
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) {
      Lanes out;
      out.part[0] = c[i];
      out.store(to + i * stride);
    }
  }
};

template <typename T> INLINE Matrices<T> anticommutator(const Matrices<T> &a, const Matrices<T> &b) {
  Matrices<T> out;
  // The vectors' part of each diagonal element lacks the element's own axis.
  const auto x = a.x * b.x, y = a.y * b.y, z = a.z * b.z;
  out.xx = 2 * (a.xx * b.xx + a.xy * b.xy + a.xz * b.xz - y - z);
  out.yy = 2 * (a.yy * b.yy + a.xy * b.xy + a.yz * b.yz - z - x);
  out.zz = 2 * (a.zz * b.zz + a.xz * b.xz + a.yz * b.yz - x - y);
  const auto a_z = a.xx + a.yy, a_x = a.yy + a.zz, a_y = a.xx + a.zz;
  const auto b_z = b.xx + b.yy, b_x = b.yy + b.zz, b_y = b.xx + b.zz;
  out.xy = a_z * b.xy + b_z * a.xy + a.xz * b.yz + a.yz * b.xz + a.x * b.y + a.y * b.x;
  out.yz = a_x * b.yz + b_x * a.yz + a.xy * b.xz + a.xz * b.xy + a.y * b.z + a.z * b.y;
  out.xz = a_y * b.xz + b_y * a.xz + a.xy * b.yz + a.yz * b.xy + a.x * b.z + a.z * b.x;
  out.x = a_x * b.x + b_x * a.x - a.xy * b.y - a.xz * b.z - b.xy * a.y - b.xz * a.z;
  out.y = a_y * b.y + b_y * a.y - a.xy * b.x - a.yz * b.z - b.xy * a.x - b.yz * a.z;
  out.z = a_z * b.z + b_z * a.z - a.xz * b.x - a.yz * b.y - b.xz * a.x - b.yz * a.y;
  return out;
}

// Coefficients [A, 9, F] of {a, b}, or of {a, b^T}, for coefficients of the same shape.
Tensor matrix_anticommutator(const Tensor &a_, const Tensor &b_, bool transposed) {
  TORCH_CHECK(a_.dim() == 3 && a_.size(1) == kCoefficients && a_.sizes() == b_.sizes(),
              "matrices must be [atoms, 9, features]");
  TORCH_CHECK(a_.size(2) % kTile == 0, "the number of features is ", a_.size(2), "; it must be a multiple of 16");
  const Tensor a = a_.stride(2) == 1 ? a_ : a_.contiguous(), b = b_.stride(2) == 1 ? b_ : b_.contiguous();
  const int64_t atoms = a.size(0), F = a.size(2);
  Tensor out = at::empty({atoms, kCoefficients, F}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "matrix_anticommutator", [&] {
    using M = Matrices<scalar_t>;
    const scalar_t *from_a = a.const_data_ptr<scalar_t>(), *from_b = b.const_data_ptr<scalar_t>();
    scalar_t *to = out.data_ptr<scalar_t>();
    const scalar_t sign = transposed ? -1 : 1;
    at::parallel_for(0, atoms, kAtomBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t f = 0; f < F; f += M::kWidth) {
          const M left = M::load(from_a + n * a.stride(0) + f, a.stride(1), 1);
          const M right = M::load(from_b + n * b.stride(0) + f, b.stride(1), sign);
          anticommutator(left, right).store(to + n * kCoefficients * F + f, F);
        }
    });
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("matrix_anticommutator(Tensor a, Tensor b, bool transposed) -> Tensor");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) { library.impl("matrix_anticommutator", &matrix_anticommutator); }
