// Matrices divided by their squared norm plus one, for each atom and feature, with first and second derivatives.
//
// For coefficients x of a matrix and r = 1 / (|x|^2 + 1), the result is r x. Its derivative along g is
//   N(x, g) = r g - 2 r^2 (x . g) x,
// which is symmetric, so it is the gradient of g . r x as well; the gradient of h . N(x, g) with respect to x is
//   -2 r^2 [(x . h) g + (x . g) h + (g . h - 4 r (x . g) (x . h)) x].

#include "lanes.h"

namespace {

constexpr int kCoefficients = 9;

// The coefficients of as many features as a native vector holds.
template <typename T> struct Coefficients {
  using Lanes = Pack<T, kVectorBytes / sizeof(T)>;
  using Vector = typename Lanes::Vector;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  Vector c[kCoefficients];

  static INLINE Coefficients load(const T *from, int64_t stride) {
    Coefficients out;
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) out.c[i] = Lanes::load(from + i * stride).part[0];
    return out;
  }
  INLINE void store(T *to, int64_t stride) const {
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) {
      Lanes out;
      out.part[0] = c[i];
      out.store(to + i * stride);
    }
  }
  INLINE Vector dot(const Coefficients &other) const {
    Vector sum = c[0] * other.c[0];
    UNROLL
    for (int i = 1; i < kCoefficients; ++i) sum += c[i] * other.c[i];
    return sum;
  }
  INLINE Coefficients times(const Vector &factor) const {
    Coefficients out;
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) out.c[i] = c[i] * factor;
    return out;
  }
  INLINE void add_product(const Coefficients &other, const Vector &factor) {
    UNROLL
    for (int i = 0; i < kCoefficients; ++i) c[i] += other.c[i] * factor;
  }
};

// A tensor [A, 9, F] whose features lie side by side; null if it is left out.
template <typename T> struct Rows {
  const T *data = nullptr;
  int64_t atom = 0, coefficient = 0;
  explicit operator bool() const { return data != nullptr; }
  INLINE Coefficients<T> at(int64_t n, int64_t f) const {
    return Coefficients<T>::load(data + n * atom + f, coefficient);
  }
};

template <typename T> Rows<T> rows_of(const MaybeTensor &x) {
  if (!x.has_value()) return {};
  return {x->const_data_ptr<T>(), x->stride(0), x->stride(1)};
}

inline MaybeTensor side_by_side(const MaybeTensor &x) {
  return !x.has_value() || x->stride(2) == 1 ? x : MaybeTensor(x->contiguous());
}

template <typename T>
INLINE Coefficients<T> normalised(const Rows<T> &x_, const Rows<T> &g_, const Rows<T> &h_, int64_t n, int64_t f) {
  const Coefficients<T> x = x_.at(n, f);
  const auto r = 1 / (x.dot(x) + 1);
  if (!g_) return x.times(r);
  const Coefficients<T> g = g_.at(n, f);
  const auto along_g = x.dot(g), twice = -2 * r * r;
  Coefficients<T> out;
  if (!h_) {
    out = g.times(r);
    out.add_product(x, twice * along_g);
    return out;
  }
  const Coefficients<T> h = h_.at(n, f);
  const auto along_h = x.dot(h);
  out = g.times(twice * along_h);
  out.add_product(h, twice * along_g);
  out.add_product(x, twice * (g.dot(h) - 4 * r * along_g * along_h));
  return out;
}

// Coefficients [A, 9, F] of the result, of its derivative along g, or of the gradient of h times that derivative.
Tensor matrix_normalised(const Tensor &x_, const MaybeTensor &g_, const MaybeTensor &h_) {
  TORCH_CHECK(x_.dim() == 3 && x_.size(1) == kCoefficients, "matrices must be [atoms, 9, features]");
  for (const MaybeTensor &other : {g_, h_})
    TORCH_CHECK(!other.has_value() || other->sizes() == x_.sizes(), "derivatives must have the shape of the matrices");
  TORCH_CHECK(g_.has_value() || !h_.has_value(), "a second derivative is one along two directions");
  TORCH_CHECK(x_.size(2) % kTile == 0, "the number of features is ", x_.size(2), "; it must be a multiple of 16");
  const MaybeTensor x = side_by_side(x_), g = side_by_side(g_), h = side_by_side(h_);
  const int64_t atoms = x_.size(0), F = x_.size(2);
  Tensor out = at::empty({atoms, kCoefficients, F}, x_.options());
  AT_DISPATCH_FLOATING_TYPES(x_.scalar_type(), "matrix_normalised", [&] {
    const auto of_x = rows_of<scalar_t>(x), of_g = rows_of<scalar_t>(g), of_h = rows_of<scalar_t>(h);
    scalar_t *to = out.data_ptr<scalar_t>();
    at::parallel_for(0, atoms, kAtomBlock, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n)
        for (int64_t f = 0; f < F; f += Coefficients<scalar_t>::kWidth)
          normalised(of_x, of_g, of_h, n, f).store(to + n * kCoefficients * F + f, F);
    });
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("matrix_normalised(Tensor x, Tensor? g, Tensor? h) -> Tensor");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) { library.impl("matrix_normalised", &matrix_normalised); }
