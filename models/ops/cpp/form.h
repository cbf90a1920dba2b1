// The operands of the form behind the sums over neighbours (pair_sums.cpp), and parts of it that operators share.
#pragma once

#include "lanes.h"

namespace {

constexpr int kMaxDegree = 4;

// Calls work(std::integral_constant<int, 2 l + 1>) for a degree l, so that loops over components are unrolled.
template <typename F> INLINE void with_components(int64_t degree, const F &work) {
  switch (degree) {
  case 0: return work(std::integral_constant<int, 1>());
  case 1: return work(std::integral_constant<int, 3>());
  case 2: return work(std::integral_constant<int, 5>());
  case 3: return work(std::integral_constant<int, 7>());
  default: return work(std::integral_constant<int, 9>());
  }
}

inline int64_t degree_of(int64_t components) {
  for (int64_t degree = 0; degree <= kMaxDegree; ++degree)
    if ((degree + 1) * (degree + 1) == components) return degree;
  TORCH_CHECK(false, "the number of components is ", components, "; it must be (l + 1)^2 for a degree l of at most ",
              kMaxDegree);
}

// The degrees of the tensors: 0 to L, 0 alone, or 1 to L.
struct Degrees {
  int64_t first = 0, last = -1;
  bool hold(int64_t degree) const { return first <= degree && degree <= last; }
  // Place of a degree among the components, and among the degrees.
  int64_t component(int64_t degree) const { return degree * degree - first; }
  int64_t place(int64_t degree) const { return degree - first; }
  int64_t count() const { return last - first + 1; }
};

inline Degrees degrees_of(int64_t components) {
  if (components == 0) return {};
  for (int64_t last = 0; last <= kMaxDegree; ++last) {
    if ((last + 1) * (last + 1) == components) return {0, last};
    if ((last + 1) * (last + 1) - 1 == components) return {1, last};
  }
  TORCH_CHECK(false, "tensors have ", components, " components; they must be (L + 1)^2, or one less, for a degree L of "
                     "at most ", kMaxDegree);
}

inline Degrees degrees_of(const MaybeTensor &tensors) { return degrees_of(tensors.has_value() ? tensors->size(1) : 0); }

// The same, for tensors that are summed with harmonics up to a degree.
inline Degrees degrees_within(const MaybeTensor &tensors, const MaybeTensor &scalars, int64_t degree) {
  const Degrees found = degrees_of(tensors);
  TORCH_CHECK(found.last <= degree, "tensors have degrees above that of the harmonics");
  TORCH_CHECK(!scalars.has_value() || scalars->size(1) == degree, "there are scalars for ", scalars->size(1),
              " degrees; there must be ", degree);
  return found;
}

// Node features [A, C, F] as tiles [F / 16, A, C, 16]. In the first order the components of a tile lie F numbers apart,
// which for the usual powers of two are few sets of the processor's cache.
inline MaybeTensor tiled(const MaybeTensor &x) {
  if (!x.has_value()) return x;
  TORCH_CHECK(x->size(2) % kTile == 0, "the number of features is ", x->size(2), "; it must be a multiple of 16");
  const Tensor dense = x->stride(2) == 1 ? *x : x->contiguous();
  const int64_t atoms = x->size(0), components = x->size(1), tiles = x->size(2) / kTile;
  Tensor out = at::empty({tiles, atoms, components, kTile}, x->options());
  const int64_t bytes = kTile * x->element_size(), unit = x->element_size();
  const char *from = static_cast<const char *>(dense.const_data_ptr());
  char *to = static_cast<char *>(out.data_ptr());
  // Much faster than the general copy of a permuted tensor.
  at::parallel_for(0, atoms, kAtomBlock, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      for (int64_t c = 0; c < components; ++c) {
        const char *row = from + (n * dense.stride(0) + c * dense.stride(1)) * unit;
        char *place = to + (n * components + c) * bytes;
        for (int64_t tile = 0; tile < tiles; ++tile)
          std::copy_n(row + tile * bytes, bytes, place + tile * atoms * components * bytes);
      }
  });
  return out;
}

template <typename T> struct Tiles {
  const T *data = nullptr;
  int64_t atoms = 0, components = 0;
  const T *at(int64_t atom, int64_t component, int64_t f) const {
    return data + ((f / kTile * atoms + atom) * components + component) * kTile;
  }
  explicit operator bool() const { return data != nullptr; }
};

template <typename T> Tiles<T> tiles_of(const MaybeTensor &x) {
  if (!x.has_value()) return {};
  return {x->const_data_ptr<T>(), x->size(1), x->size(2)};
}

// Weights [B, columns], whose rows may lie further apart; null if their path is left out.
template <typename T> struct Weights {
  const T *data = nullptr;
  int64_t stride = 0;
};

inline MaybeTensor dense_rows(const MaybeTensor &x) {
  return !x.has_value() || x->stride(1) == 1 ? x : MaybeTensor(x->contiguous());
}

template <typename T> Weights<T> weights_of(const MaybeTensor &x) {
  if (!x.has_value()) return {};
  return {x->const_data_ptr<T>(), x->stride(0)};
}

// What both atoms of each pair share.
template <typename T> struct Pairs {
  const T *radial, *harmonics; // [slots, B], [slots, H]
  int64_t functions, components, features, degree;
  // Harmonics of a degree above 0 of a slot.
  const T *of(int64_t slot, int64_t degree) const { return harmonics + slot * components + degree * degree - 1; }
};

template <typename T> Pairs<T> pairs_of(const Tensor &radial, const Tensor &harmonics, int64_t features) {
  TORCH_CHECK(radial.is_contiguous() && harmonics.is_contiguous(), "pairs must be dense");
  const int64_t components = harmonics.size(2);
  return {radial.const_data_ptr<T>(), harmonics.const_data_ptr<T>(), radial.size(2), components, features,
          degree_of(components + 1)};
}

// Loops trust these; operands that do not fit together must not read or write where they like.
inline void check_features(const MaybeTensor &features, int64_t atoms, int64_t width) {
  if (!features.has_value()) return;
  TORCH_CHECK(features->dim() == 3 && features->size(0) == atoms && features->size(2) == width,
              "features must be [", atoms, ", components, ", width, "]");
}

inline void check_weight(const MaybeTensor &weight, int64_t degrees, int64_t functions, int64_t width) {
  if (degrees == 0) return;
  TORCH_CHECK(weight.has_value() && weight->size(0) == functions && weight->size(1) == degrees * width,
              "weights must be [", functions, ", ", degrees * width, "]");
}

inline void check_pairs(const Tensor &row_atom, const Tensor &radial, const Tensor &harmonics, int64_t components) {
  for (const Tensor &x : {radial, harmonics})
    TORCH_CHECK(x.dim() == 3 && x.size(0) == row_atom.size(0) && x.size(1) == kSlots, "pairs must be [rows, 8, ...]");
  TORCH_CHECK(components == harmonics.size(2) + 1, "a result has one component more than there are harmonics");
}

// w[k] = sum_b radial[k][b] * weight[b][tile] for a group of slots.
template <typename T, int K>
INLINE void filters(const T *radial, int64_t functions, const T *weight, int64_t stride, Tile<T> (&w)[K]) {
  UNROLL
  for (int k = 0; k < K; ++k) w[k] = Tile<T>::zero();
  for (int64_t b = 0; b < functions; ++b) {
    const Tile<T> row = Tile<T>::load(weight + b * stride);
    UNROLL
    for (int k = 0; k < K; ++k) w[k].add_product(row, radial[k * functions + b]);
  }
}

} // namespace
