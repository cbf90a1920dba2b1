// Products of functions on the sphere that an atom holds for each feature, as coefficients of spherical harmonics.
//
// Functions f_1 ... f_K, each [A, C, F], are evaluated on P points, multiplied, and their averages with the harmonics
// are taken:
//   out_c = sum_p w_p Y_c(p) f_1(p) ... f_K(p),   f_i(p) = sum_c Y_c(p) f_ic
// The form is symmetric in its functions and in what its result is multiplied with, so the derivative with respect to a
// function has the same form, with h, the gradient of the result, in the place of that function. The operators share
// evaluations: one returns the product, one the derivatives with respect to all functions, and one the derivatives of
// those, which training on forces needs. Values on points, [P, A, F] in a plain implementation, stay in the first cache.

#include "lanes.h"

namespace {

constexpr int kMaxFactors = 4, kMaxComponents = 49;
constexpr int kPoints = 8; // points whose sums are taken together; tables are filled up to a multiple of it

template <typename T> struct Sphere {
  using Lanes = Pack<T, kVectorBytes / sizeof(T)>;
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  using Values = Lanes[kPoints];
  const T *harmonics, *weights; // [C, P], [P]
  int64_t points;

  // Values of a function with `components` coefficients, `stride` numbers apart, on points p ... p + 7.
  INLINE void evaluate(const T *function, int64_t stride, int64_t components, int64_t p, Values &values) const {
    UNROLL
    for (int q = 0; q < kPoints; ++q) values[q] = Lanes::zero();
    for (int64_t c = 0; c < components; ++c) {
      const Lanes x = Lanes::load(function + c * stride);
      const T *row = harmonics + c * points + p;
      UNROLL
      for (int q = 0; q < kPoints; ++q) values[q].add_product(x, row[q]);
    }
  }

  // Adds the averages of values with the harmonics to sums of coefficients.
  INLINE void expand(const Values &values, int64_t components, int64_t p, Lanes *sums) const {
    for (int64_t c = 0; c < components; ++c) {
      const T *row = harmonics + c * points + p;
      Lanes sum = sums[c];
      UNROLL
      for (int q = 0; q < kPoints; ++q) sum.add_product(values[q], row[q]);
      sums[c] = sum;
    }
  }
};

// Functions [A, C, F] whose features lie side by side.
template <typename T> struct Functions {
  const T *data;
  int64_t atom_stride, stride, components;
  const T *at(int64_t atom, int64_t f) const { return data + atom * atom_stride + f; }
};

inline Tensor with_dense_features(const Tensor &x) { return x.stride(2) == 1 ? x : x.contiguous(); }

template <typename T> Functions<T> functions_of(const Tensor &x) {
  return {x.const_data_ptr<T>(), x.stride(0), x.stride(1), x.size(1)};
}

inline void check_functions(const Tensor &x, const Tensor &like, int64_t components) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) == like.size(0) && x.size(2) == like.size(2) && x.size(1) <= components &&
                  x.scalar_type() == like.scalar_type(),
              "functions must be [atoms, at most ", components, ", features], all alike");
}

inline void check_sphere(at::TensorList factors, const Tensor &harmonics, const Tensor &weights) {
  TORCH_CHECK(2 <= factors.size() && factors.size() <= kMaxFactors, "a product has 2 to ", kMaxFactors, " factors");
  TORCH_CHECK(harmonics.dim() == 2 && harmonics.is_contiguous() && weights.is_contiguous() &&
                  harmonics.size(1) == weights.numel() && weights.numel() % kPoints == 0 &&
                  harmonics.size(0) <= kMaxComponents,
              "tables must be dense, [at most ", kMaxComponents, ", points] and [points], of a multiple of ", kPoints);
  for (const Tensor &x : {harmonics, weights})
    TORCH_CHECK(x.scalar_type() == factors[0].scalar_type(), "tables must have the type of the functions");
  TORCH_CHECK(factors[0].size(2) % kTile == 0, "the number of features is ", factors[0].size(2),
              "; it must be a multiple of 16");
  for (const Tensor &x : factors) check_functions(x, factors[0], harmonics.size(0));
}

template <typename F> INLINE void with_factors(int64_t count, const F &work) {
  switch (count) {
  case 2: return work(std::integral_constant<int, 2>());
  case 3: return work(std::integral_constant<int, 3>());
  default: return work(std::integral_constant<int, 4>());
  }
}

// Product of the values of all functions but two (or one, or none: -1).
template <typename Lanes, int K>
INLINE Lanes product_without(const Lanes (&values)[K][kPoints], int q, int one, int other, Lanes start) {
  UNROLL
  for (int i = 0; i < K; ++i)
    if (i != one && i != other) start = start.times(values[i][q]);
  return start;
}

template <typename Lanes> INLINE Lanes filled(typename std::remove_reference<decltype(Lanes().total())>::type value) {
  Lanes out;
  UNROLL
  for (int i = 0; i < Lanes::kParts; ++i) out.part[i] = typename Lanes::Vector{} + value;
  return out;
}

template <typename Lanes, typename T> INLINE void store(const Lanes *sums, int64_t components, int64_t features, T *to) {
  for (int64_t c = 0; c < components; ++c) sums[c].store(to + c * features);
}

// Calls work(atom, first feature) for all atoms and vectors of features, shared between the threads.
template <int kWidth, typename F> void each_vector(int64_t atoms, int64_t features, const F &work) {
  at::parallel_for(0, atoms, kAtomBlock, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t f = 0; f < features; f += kWidth) work(n, f);
  });
}

template <typename T, int K>
void multiply(const Sphere<T> &sphere, const Functions<T> (&in)[K], int64_t atoms, int64_t features,
              int64_t components, T *out) {
  using Lanes = typename Sphere<T>::Lanes;
  each_vector<Sphere<T>::kWidth>(atoms, features, [&](int64_t n, int64_t f) {
    Lanes sums[kMaxComponents], values[K][kPoints], product[kPoints];
    for (int64_t c = 0; c < components; ++c) sums[c] = Lanes::zero();
    for (int64_t p = 0; p < sphere.points; p += kPoints) {
      UNROLL
      for (int i = 0; i < K; ++i) sphere.evaluate(in[i].at(n, f), in[i].stride, in[i].components, p, values[i]);
      UNROLL
      for (int q = 0; q < kPoints; ++q)
        product[q] = product_without(values, q, -1, -1, filled<Lanes>(sphere.weights[p + q]));
      sphere.expand(product, components, p, sums);
    }
    store(sums, components, features, out + n * components * features + f);
  });
}

// Derivatives with respect to each function of the product times h.
template <typename T, int K>
void differentiate(const Sphere<T> &sphere, const Functions<T> (&in)[K], const Functions<T> &h, int64_t atoms,
                   int64_t features, T *const (&out)[K]) {
  using Lanes = typename Sphere<T>::Lanes;
  each_vector<Sphere<T>::kWidth>(atoms, features, [&](int64_t n, int64_t f) {
    Lanes sums[K][kMaxComponents], values[K][kPoints], of_h[kPoints], product[kPoints];
    for (int i = 0; i < K; ++i)
      for (int64_t c = 0; c < in[i].components; ++c) sums[i][c] = Lanes::zero();
    for (int64_t p = 0; p < sphere.points; p += kPoints) {
      for (int i = 0; i < K; ++i) sphere.evaluate(in[i].at(n, f), in[i].stride, in[i].components, p, values[i]);
      sphere.evaluate(h.at(n, f), h.stride, h.components, p, of_h);
      for (int q = 0; q < kPoints; ++q) of_h[q] = of_h[q].times(filled<Lanes>(sphere.weights[p + q]));
      UNROLL
      for (int i = 0; i < K; ++i) {
        UNROLL
        for (int q = 0; q < kPoints; ++q) product[q] = product_without(values, q, i, -1, of_h[q]);
        sphere.expand(product, in[i].components, p, sums[i]);
      }
    }
    for (int i = 0; i < K; ++i)
      store(sums[i], in[i].components, features, out[i] + n * in[i].components * features + f);
  });
}

// Derivatives of the sum of those derivatives times t_i, with respect to h (the first of `out`) and each function.
template <typename T, int K>
void differentiate_twice(const Sphere<T> &sphere, const Functions<T> (&in)[K], const Functions<T> &h,
                         const Functions<T> (&along)[K], int64_t atoms, int64_t features, T *const (&out)[K + 1]) {
  using Lanes = typename Sphere<T>::Lanes;
  each_vector<Sphere<T>::kWidth>(atoms, features, [&](int64_t n, int64_t f) {
    Lanes sums[K + 1][kMaxComponents], values[K][kPoints], turned[K][kPoints], of_h[kPoints], product[kPoints];
    for (int i = 0; i <= K; ++i)
      for (int64_t c = 0; c < (i ? in[i - 1] : h).components; ++c) sums[i][c] = Lanes::zero();
    for (int64_t p = 0; p < sphere.points; p += kPoints) {
      for (int i = 0; i < K; ++i) {
        sphere.evaluate(in[i].at(n, f), in[i].stride, in[i].components, p, values[i]);
        sphere.evaluate(along[i].at(n, f), along[i].stride, along[i].components, p, turned[i]);
      }
      sphere.evaluate(h.at(n, f), h.stride, h.components, p, of_h);
      for (int q = 0; q < kPoints; ++q) {
        const Lanes weight = filled<Lanes>(sphere.weights[p + q]);
        of_h[q] = of_h[q].times(weight);
        product[q] = Lanes::zero();
        UNROLL
        for (int i = 0; i < K; ++i) product[q].add_product(product_without(values, q, i, -1, weight), turned[i][q]);
      }
      sphere.expand(product, h.components, p, sums[0]);
      UNROLL
      for (int m = 0; m < K; ++m) {
        for (int q = 0; q < kPoints; ++q) {
          product[q] = Lanes::zero();
          UNROLL
          for (int i = 0; i < K; ++i)
            if (i != m) product[q].add_product(product_without(values, q, i, m, of_h[q]), turned[i][q]);
        }
        sphere.expand(product, in[m].components, p, sums[m + 1]);
      }
    }
    store(sums[0], h.components, features, out[0] + n * h.components * features + f);
    for (int i = 0; i < K; ++i)
      store(sums[i + 1], in[i].components, features, out[i + 1] + n * in[i].components * features + f);
  });
}

template <typename T, int K> void fill(const std::vector<Tensor> &tensors, Functions<T> (&out)[K]) {
  for (int i = 0; i < K; ++i) out[i] = functions_of<T>(tensors[i]);
}

inline std::vector<Tensor> all_with_dense_features(at::TensorList tensors) {
  std::vector<Tensor> out;
  for (const Tensor &x : tensors) out.push_back(with_dense_features(x));
  return out;
}

Tensor sphere_product(at::TensorList factors_, const Tensor &harmonics, const Tensor &weights, int64_t components) {
  check_sphere(factors_, harmonics, weights);
  TORCH_CHECK(components <= harmonics.size(0), "a result has at most ", harmonics.size(0), " components");
  const std::vector<Tensor> factors = all_with_dense_features(factors_);
  const int64_t atoms = factors[0].size(0), F = factors[0].size(2);
  Tensor out = at::empty({atoms, components, F}, factors[0].options());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "sphere_product", [&] {
    const Sphere<scalar_t> sphere{harmonics.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
                                  weights.numel()};
    with_factors(factors.size(), [&](auto count) {
      Functions<scalar_t> in[decltype(count)::value];
      fill(factors, in);
      multiply(sphere, in, atoms, F, components, out.data_ptr<scalar_t>());
    });
  });
  return out;
}

std::vector<Tensor> sphere_gradients(at::TensorList factors_, const Tensor &harmonics, const Tensor &weights,
                                     const Tensor &h_) {
  check_sphere(factors_, harmonics, weights);
  check_functions(h_, factors_[0], harmonics.size(0));
  const std::vector<Tensor> factors = all_with_dense_features(factors_);
  const Tensor h = with_dense_features(h_);
  const int64_t atoms = h.size(0), F = h.size(2);
  std::vector<Tensor> out;
  for (const Tensor &x : factors) out.push_back(at::empty(x.sizes(), x.options()));
  AT_DISPATCH_FLOATING_TYPES(h.scalar_type(), "sphere_gradients", [&] {
    const Sphere<scalar_t> sphere{harmonics.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
                                  weights.numel()};
    with_factors(factors.size(), [&](auto count) {
      constexpr int K = decltype(count)::value;
      Functions<scalar_t> in[K];
      fill(factors, in);
      scalar_t *to[K];
      for (int i = 0; i < K; ++i) to[i] = out[i].data_ptr<scalar_t>();
      differentiate<scalar_t, K>(sphere, in, functions_of<scalar_t>(h), atoms, F, to);
    });
  });
  return out;
}

std::vector<Tensor> sphere_curvatures(at::TensorList factors_, const Tensor &harmonics, const Tensor &weights,
                                      const Tensor &h_, at::TensorList along_) {
  check_sphere(factors_, harmonics, weights);
  check_functions(h_, factors_[0], harmonics.size(0));
  TORCH_CHECK(along_.size() == factors_.size(), "there must be a direction for each factor");
  for (size_t i = 0; i < along_.size(); ++i)
    TORCH_CHECK(along_[i].sizes() == factors_[i].sizes() && along_[i].scalar_type() == h_.scalar_type(),
                "directions must be like their factors");
  const std::vector<Tensor> factors = all_with_dense_features(factors_), along = all_with_dense_features(along_);
  const Tensor h = with_dense_features(h_);
  const int64_t atoms = h.size(0), F = h.size(2);
  std::vector<Tensor> out{at::empty(h.sizes(), h.options())};
  for (const Tensor &x : factors) out.push_back(at::empty(x.sizes(), x.options()));
  AT_DISPATCH_FLOATING_TYPES(h.scalar_type(), "sphere_curvatures", [&] {
    const Sphere<scalar_t> sphere{harmonics.const_data_ptr<scalar_t>(), weights.const_data_ptr<scalar_t>(),
                                  weights.numel()};
    with_factors(factors.size(), [&](auto count) {
      constexpr int K = decltype(count)::value;
      Functions<scalar_t> in[K], turned[K];
      fill(factors, in);
      fill(along, turned);
      scalar_t *to[K + 1];
      for (int i = 0; i <= K; ++i) to[i] = out[i].data_ptr<scalar_t>();
      differentiate_twice<scalar_t, K>(sphere, in, functions_of<scalar_t>(h), turned, atoms, F, to);
    });
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("sphere_product(Tensor[] factors, Tensor harmonics, Tensor weights, int components) -> Tensor");
  library.def("sphere_gradients(Tensor[] factors, Tensor harmonics, Tensor weights, Tensor h) -> Tensor[]");
  library.def("sphere_curvatures(Tensor[] factors, Tensor harmonics, Tensor weights, Tensor h, Tensor[] along) "
              "-> Tensor[]");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("sphere_product", &sphere_product);
  library.impl("sphere_gradients", &sphere_gradients);
  library.impl("sphere_curvatures", &sphere_curvatures);
}
