// Steps of TensorNet within an atom, on the 3 x 3 matrices of each feature, with their first and second derivatives.
//
// Matrices are given by nine coefficients of an orthonormal basis: that of the trace, those of the skew part (the matrix
// of the cross product with a vector v; y, z, x), and those of the traceless symmetric part (xy, yz, zz, xz, xx - yy).
// A step is s(A, B), either {A, B} = AB + BA or A + B + BB, then perhaps N(s) = s / (|s|^2 + 1). With r = 1 / (|s|^2 + 1)
//   the derivative of N along G is       N'(s, G) = r G - 2 r^2 (s . G) s, which is symmetric, so a gradient as well;
//   the gradient of H . N'(s, G) is      N''(s, G, H) = -2 r^2 [(s . H) G + (s . G) H + (G . H - 4 r (s . G) (s . H)) s];
//   the gradient of K . {A, B} for A is  {K, B^T}.
// Each operator reads and writes every array once; steps made of several operators wait for the memory.

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

  // From coefficients that lie `stride` numbers apart.
  static INLINE Matrices load(const T *from, int64_t stride) {
    Vector c[kCoefficients];
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) c[i] = Lanes::load(from + i * stride).part[0];
    const T half = kHalf, third = kThird, sixth = kSixth;
    const Vector mean = third * c[0], along = sixth * c[6], across = half * c[8];
    return {mean - along + across, mean - along - across, mean + 2 * along, half * c[4], half * c[5], half * c[7],
            half * c[3],           half * c[1],           half * c[2]};
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
  INLINE Vector dot(const Matrices &o) const {
    const Vector diagonal = xx * o.xx + yy * o.yy + zz * o.zz;
    return diagonal + 2 * (xy * o.xy + yz * o.yz + xz * o.xz + x * o.x + y * o.y + z * o.z);
  }
  INLINE Matrices transposed() const { return {xx, yy, zz, xy, yz, xz, -x, -y, -z}; }
  INLINE Matrices operator+(const Matrices &o) const {
    return {xx + o.xx, yy + o.yy, zz + o.zz, xy + o.xy, yz + o.yz, xz + o.xz, x + o.x, y + o.y, z + o.z};
  }
  INLINE Matrices operator*(const Vector &f) const {
    return {xx * f, yy * f, zz * f, xy * f, yz * f, xz * f, x * f, y * f, z * f};
  }
};

// {A, B}: of symmetric parts M and vectors v, the symmetric part is {M, M'} + v v'^T + v' v^T - 2 v . v' and the vector
// (tr M - M) v' + (tr M' - M') v, which is less work than two products.
template <typename T> INLINE Matrices<T> both_orders(const Matrices<T> &a, const Matrices<T> &b) {
  Matrices<T> out;
  // What the vectors add to a diagonal element lacks the element's own axis.
  const auto x = a.x * b.x, y = a.y * b.y, z = a.z * b.z;
  out.xx = 2 * (a.xx * b.xx + a.xy * b.xy + a.xz * b.xz - y - z);
  out.yy = 2 * (a.yy * b.yy + a.xy * b.xy + a.yz * b.yz - z - x);
  out.zz = 2 * (a.zz * b.zz + a.xz * b.xz + a.yz * b.yz - x - y);
  const auto a_x = a.yy + a.zz, a_y = a.xx + a.zz, a_z = a.xx + a.yy;
  const auto b_x = b.yy + b.zz, b_y = b.xx + b.zz, b_z = b.xx + b.yy;
  out.xy = a_z * b.xy + b_z * a.xy + a.xz * b.yz + a.yz * b.xz + a.x * b.y + a.y * b.x;
  out.yz = a_x * b.yz + b_x * a.yz + a.xy * b.xz + a.xz * b.xy + a.y * b.z + a.z * b.y;
  out.xz = a_y * b.xz + b_y * a.xz + a.xy * b.yz + a.yz * b.xy + a.x * b.z + a.z * b.x;
  out.x = a_x * b.x + b_x * a.x - a.xy * b.y - a.xz * b.z - b.xy * a.y - b.xz * a.z;
  out.y = a_y * b.y + b_y * a.y - a.xy * b.x - a.yz * b.z - b.xy * a.x - b.yz * a.z;
  out.z = a_z * b.z + b_z * a.z - a.xz * b.x - a.yz * b.y - b.xz * a.x - b.yz * a.y;
  return out;
}

template <typename T> struct Two {
  Matrices<T> a, b;
};

// s(A, B), its derivative along (H, H'), the gradients of K . s, and those of K times the derivative along (H, H').
struct Anticommutator {
  template <typename T> static INLINE Matrices<T> value(const Two<T> &in) { return both_orders(in.a, in.b); }
  template <typename T> static INLINE Matrices<T> along(const Two<T> &in, const Two<T> &h) {
    return both_orders(h.a, in.b) + both_orders(h.b, in.a);
  }
  template <typename T> static INLINE Two<T> gradients(const Two<T> &in, const Matrices<T> &k) {
    return {both_orders(k, in.b.transposed()), both_orders(k, in.a.transposed())};
  }
  template <typename T> static INLINE Two<T> gradients_along(const Two<T> &h, const Matrices<T> &k, const Two<T> &more) {
    return {more.a + both_orders(k, h.b.transposed()), more.b + both_orders(k, h.a.transposed())};
  }
};

struct Residual {
  template <typename T> static INLINE Matrices<T> value(const Two<T> &in) {
    return in.a + in.b + both_orders(in.b, in.b * (typename Matrices<T>::Vector{} + T(0.5)));
  }
  template <typename T> static INLINE Matrices<T> along(const Two<T> &in, const Two<T> &h) {
    return h.a + h.b + both_orders(h.b, in.b);
  }
  template <typename T> static INLINE Two<T> gradients(const Two<T> &in, const Matrices<T> &k) {
    return {k, k + both_orders(k, in.b.transposed())};
  }
  template <typename T> static INLINE Two<T> gradients_along(const Two<T> &h, const Matrices<T> &k, const Two<T> &more) {
    return {more.a, more.b + both_orders(k, h.b.transposed())};
  }
};

template <bool kNormalised, typename T> INLINE Matrices<T> normalised(const Matrices<T> &s) {
  if constexpr (!kNormalised) return s;
  else return s * (1 / (s.dot(s) + 1));
}

template <bool kNormalised, typename T>
INLINE Matrices<T> normalised_along(const Matrices<T> &s, const Matrices<T> &g) {
  if constexpr (!kNormalised) return g;
  else {
    const auto r = 1 / (s.dot(s) + 1);
    return g * r + s * (-2 * r * r * s.dot(g));
  }
}

template <typename T>
INLINE Matrices<T> normalised_twice(const Matrices<T> &s, const Matrices<T> &g, const Matrices<T> &h) {
  const auto r = 1 / (s.dot(s) + 1), factor = -2 * r * r, along_g = s.dot(g), along_h = s.dot(h);
  return g * (factor * along_h) + h * (factor * along_g) + s * (factor * (g.dot(h) - 4 * r * along_g * along_h));
}

// The result of a step.
template <typename Step, bool kNormalised, typename T> INLINE void step(const Matrices<T> *in, Matrices<T> *out) {
  out[0] = normalised<kNormalised>(Step::value(Two<T>{in[0], in[1]}));
}

// The gradients of G times the result with respect to A and B.
template <typename Step, bool kNormalised, typename T> INLINE void gradients(const Matrices<T> *in, Matrices<T> *out) {
  const Two<T> ab{in[0], in[1]};
  const Two<T> found = Step::gradients(ab, normalised_along<kNormalised>(Step::value(ab), in[2]));
  out[0] = found.a;
  out[1] = found.b;
}

// The gradients of H times the gradient for A plus H' times that for B, with respect to A, B and G. That sum is G times
// the derivative of the result along (H, H').
template <typename Step, bool kNormalised, typename T> INLINE void curvature(const Matrices<T> *in, Matrices<T> *out) {
  const Two<T> ab{in[0], in[1]}, h{in[3], in[4]};
  const Matrices<T> s = Step::value(ab), along = Step::along(ab, h);
  out[2] = normalised_along<kNormalised>(s, along);
  Two<T> more{};
  if constexpr (kNormalised) more = Step::gradients(ab, normalised_twice(s, in[2], along));
  const Two<T> found = Step::gradients_along(h, normalised_along<kNormalised>(s, in[2]), more);
  out[0] = found.a;
  out[1] = found.b;
}

// Tensors [A, 9, F] for the results of work(inputs, outputs) for each atom and vector of features.
template <int kIn, int kOut, typename T, typename F>
void each_matrix(const std::vector<Tensor> &inputs, std::vector<Tensor> &outputs, const F &work) {
  const int64_t atoms = inputs[0].size(0), features = inputs[0].size(2);
  const T *from[kIn];
  T *to[kOut];
  int64_t atom[kIn], coefficient[kIn];
  for (int i = 0; i < kIn; ++i) {
    from[i] = inputs[i].const_data_ptr<T>();
    atom[i] = inputs[i].stride(0);
    coefficient[i] = inputs[i].stride(1);
  }
  for (int i = 0; i < kOut; ++i) to[i] = outputs[i].data_ptr<T>();
  at::parallel_for(0, atoms, kAtomBlock, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t f = 0; f < features; f += Matrices<T>::kWidth) {
        Matrices<T> in[kIn], out[kOut];
        UNROLL
        for (int i = 0; i < kIn; ++i) in[i] = Matrices<T>::load(from[i] + n * atom[i] + f, coefficient[i]);
        work(in, out);
        UNROLL
        for (int i = 0; i < kOut; ++i) out[i].store(to[i] + n * kCoefficients * features + f, features);
      }
  });
}

// Calls work(step, std::bool_constant<whether its result is normalised>).
template <typename F> void with_step(int64_t kind, const F &work) {
  TORCH_CHECK(kind >= 0 && kind < 3, "there is no step of kind ", kind);
  if (kind == 0) work(Anticommutator(), std::true_type());
  if (kind == 1) work(Residual(), std::true_type());
  if (kind == 2) work(Residual(), std::false_type());
}

// Checks inputs and makes them readable by vectors; returns outputs of the same shape.
inline std::vector<Tensor> prepared(std::vector<Tensor> &inputs, int count) {
  const Tensor first = inputs[0];
  TORCH_CHECK(first.dim() == 3 && first.size(1) == kCoefficients, "matrices must be [atoms, 9, features]");
  TORCH_CHECK(first.size(2) % kTile == 0, "the number of features is ", first.size(2),
              "; it must be a multiple of 16");
  for (Tensor &input : inputs) {
    TORCH_CHECK(input.sizes() == first.sizes() && input.scalar_type() == first.scalar_type(),
                "matrices of a step must have the same shape and precision");
    if (input.stride(2) != 1) input = input.contiguous();
  }
  std::vector<Tensor> outputs;
  for (int i = 0; i < count; ++i) outputs.push_back(at::empty(first.sizes(), first.options()));
  return outputs;
}

Tensor matrix_step(const Tensor &a, const Tensor &b, int64_t kind) {
  std::vector<Tensor> in{a, b}, out = prepared(in, 1);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "matrix_step", [&] {
    with_step(kind, [&](auto of, auto norm) {
      each_matrix<2, 1, scalar_t>(in, out, [](const Matrices<scalar_t> *from, Matrices<scalar_t> *to) {
        step<decltype(of), decltype(norm)::value>(from, to);
      });
    });
  });
  return out[0];
}

std::tuple<Tensor, Tensor> matrix_step_gradients(const Tensor &a, const Tensor &b, const Tensor &g, int64_t kind) {
  std::vector<Tensor> in{a, b, g}, out = prepared(in, 2);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "matrix_step_gradients", [&] {
    with_step(kind, [&](auto of, auto norm) {
      each_matrix<3, 2, scalar_t>(in, out, [](const Matrices<scalar_t> *from, Matrices<scalar_t> *to) {
        gradients<decltype(of), decltype(norm)::value>(from, to);
      });
    });
  });
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor, Tensor> matrix_step_curvature(const Tensor &a, const Tensor &b, const Tensor &g,
                                                         const Tensor &for_a, const Tensor &for_b, int64_t kind) {
  std::vector<Tensor> in{a, b, g, for_a, for_b}, out = prepared(in, 3);
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "matrix_step_curvature", [&] {
    with_step(kind, [&](auto of, auto norm) {
      each_matrix<5, 3, scalar_t>(in, out, [](const Matrices<scalar_t> *from, Matrices<scalar_t> *to) {
        curvature<decltype(of), decltype(norm)::value>(from, to);
      });
    });
  });
  return {out[0], out[1], out[2]};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("matrix_step(Tensor a, Tensor b, int kind) -> Tensor");
  library.def("matrix_step_gradients(Tensor a, Tensor b, Tensor g, int kind) -> (Tensor, Tensor)");
  library.def("matrix_step_curvature(Tensor a, Tensor b, Tensor g, Tensor for_a, Tensor for_b, int kind) "
              "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("matrix_step", &matrix_step);
  library.impl("matrix_step_gradients", &matrix_step_gradients);
  library.impl("matrix_step_curvature", &matrix_step_curvature);
}
