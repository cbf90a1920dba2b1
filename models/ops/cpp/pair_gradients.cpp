// Derivatives of the form of pair_sums.cpp with respect to what the two atoms of a pair share, and to the weights.

#include "form.h"

namespace {

// The operands that belong to the two atoms of a pair.
template <typename T> struct Sides {
  Tiles<T> tensors, scalars, g;
  Degrees degrees; // of the tensors
  bool has_tensors(int64_t degree) const { return degrees.hold(degree); }
  bool has_scalars(int64_t degree) const { return scalars && degree > 0; }
};

// g_l[n] . x_l[j] of a group of slots, for a tile of features.
template <typename T, int C, int K>
INLINE void tensor_products(const Sides<T> &sides, int64_t n, const int64_t *j, int64_t degree, int64_t f,
                            Tile<T> (&out)[K]) {
  const int64_t other = sides.degrees.component(degree);
  UNROLL
  for (int k = 0; k < K; ++k) out[k] = Tile<T>::zero();
  UNROLL
  for (int c = 0; c < C; ++c) {
    const Tile<T> own = Tile<T>::load(sides.g.at(n, degree * degree + c, f));
    UNROLL
    for (int k = 0; k < K; ++k) out[k].add_product(own, Tile<T>::load(sides.tensors.at(j[k], other + c, f)));
  }
}

// (g_l[n] . Y_l) d_l[j] of a group of slots, for a tile of features.
template <typename T, int C, int K>
INLINE void scalar_products(const Sides<T> &sides, const Pairs<T> &pairs, int64_t slot, int64_t n, const int64_t *j,
                            int64_t degree, int64_t f, Tile<T> (&out)[K]) {
  UNROLL
  for (int k = 0; k < K; ++k) out[k] = Tile<T>::zero();
  UNROLL
  for (int c = 0; c < C; ++c) {
    const Tile<T> own = Tile<T>::load(sides.g.at(n, degree * degree + c, f));
    UNROLL
    for (int k = 0; k < K; ++k) out[k].add_product(own, pairs.of(slot + k, degree)[c]);
  }
  UNROLL
  for (int k = 0; k < K; ++k)
    out[k] = out[k].times(Tile<T>::load(sides.scalars.at(j[k], degree - 1, f)));
}

// out[k][b] += sum_f products[k][f] * weight[f][b], for N blocks of 8 radial functions.
template <typename T, int N, int K>
INLINE void contract(const T *products, const T *weight, int64_t features, int64_t width, T *out) {
  using Eight = Pack<T, 8>;
  Eight sum[K][N];
  UNROLL
  for (int k = 0; k < K; ++k)
    UNROLL
    for (int i = 0; i < N; ++i) sum[k][i] = Eight::load(out + k * width + 8 * i);
  for (int64_t f = 0; f < features; ++f) {
    Eight row[N];
    UNROLL
    for (int i = 0; i < N; ++i) row[i] = Eight::load(weight + f * width + 8 * i);
    UNROLL
    for (int k = 0; k < K; ++k)
      UNROLL
      for (int i = 0; i < N; ++i) sum[k][i].add_product(row[i], products[k * features + f]);
  }
  UNROLL
  for (int k = 0; k < K; ++k)
    UNROLL
    for (int i = 0; i < N; ++i) sum[k][i].store(out + k * width + 8 * i);
}

template <typename T, int K>
void contract_all(const T *products, const T *weight, int64_t features, int64_t width, T *out) {
  int64_t b = 0;
  for (; b + 24 <= width; b += 24) contract<T, 3, K>(products, weight + b, features, width, out + b);
  for (; b + 16 <= width; b += 16) contract<T, 2, K>(products, weight + b, features, width, out + b);
  for (; b + 8 <= width; b += 8) contract<T, 1, K>(products, weight + b, features, width, out + b);
}

// What a thread keeps between the steps of a group of slots.
template <typename T> struct Buffers {
  std::vector<T> products, radial, weighted;
  Buffers(int64_t features, int64_t width)
      : products(kGroup * features), radial(kGroup * width), weighted(kGroup * features) {}
};

// Derivative with respect to the harmonics: sum_f v_l d_l[j] g_l[n][c].
template <typename T, int C, int K>
INLINE void harmonics_gradient(const Pairs<T> &pairs, const Sides<T> &sides, const Weights<T> &weight, int64_t slot,
                               int64_t n, const int64_t *j, int64_t degree, T *buffer, T *out) {
  const int64_t F = pairs.features, B = pairs.functions;
  for (int64_t f = 0; f < F; f += kTile) {
    Tile<T> v[K];
    filters(pairs.radial + slot * B, B, weight.data + (degree - 1) * F + f, weight.stride, v);
    UNROLL
    for (int k = 0; k < K; ++k)
      v[k].times(Tile<T>::load(sides.scalars.at(j[k], degree - 1, f))).store(buffer + k * F + f);
  }
  UNROLL
  for (int k = 0; k < K; ++k) {
    Tile<T> sum[C];
    UNROLL
    for (int c = 0; c < C; ++c) sum[c] = Tile<T>::zero();
    for (int64_t f = 0; f < F; f += kTile) {
      const Tile<T> part = Tile<T>::load(buffer + k * F + f);
      const T *own = sides.g.at(n, degree * degree, f);
      UNROLL
      for (int c = 0; c < C; ++c) sum[c].add_product(part, Tile<T>::load(own + c * kTile));
    }
    T *to = out + (slot + k) * pairs.components + degree * degree - 1;
    UNROLL
    for (int c = 0; c < C; ++c) to[c] = sum[c].total();
  }
}

// Weights [B, columns] as [columns, width], with zeros behind B.
Tensor transposed_weight(const MaybeTensor &weight, int64_t width) {
  if (!weight.has_value()) return {};
  Tensor out = at::zeros({weight->size(1), width}, weight->options());
  out.narrow(1, 0, weight->size(0)).copy_(weight->t());
  return out;
}

template <typename T> struct GradientOf {
  const Pairs<T> &pairs;
  const Sides<T> &sides;
  const Weights<T> &scalar_weight;
  const T *transposed_tensor_weight, *transposed_scalar_weight; // [paths F, width]
  int64_t width;

  template <int C, int K>
  INLINE void add_degree(int64_t slot, int64_t n, const int64_t *j, int64_t l, Buffers<T> &buffers,
                         T *harmonics) const {
    const int64_t F = pairs.features;
    T *products = buffers.products.data();
    if (sides.has_tensors(l)) {
      for (int64_t f = 0; f < F; f += kTile) {
        Tile<T> held[K];
        tensor_products<T, C>(sides, n, j, l, f, held);
        UNROLL
        for (int k = 0; k < K; ++k) held[k].store(products + k * F + f);
      }
      const T *weight = transposed_tensor_weight + sides.degrees.place(l) * F * width;
      contract_all<T, K>(products, weight, F, width, buffers.radial.data());
    }
    if (sides.has_scalars(l)) {
      for (int64_t f = 0; f < F; f += kTile) {
        Tile<T> held[K];
        scalar_products<T, C>(sides, pairs, slot, n, j, l, f, held);
        UNROLL
        for (int k = 0; k < K; ++k) held[k].store(products + k * F + f);
      }
      contract_all<T, K>(products, transposed_scalar_weight + (l - 1) * F * width, F, width, buffers.radial.data());
      harmonics_gradient<T, C, K>(pairs, sides, scalar_weight, slot, n, j, l, buffers.weighted.data(), harmonics);
    }
  }

  template <int K>
  void group(int64_t slot, int64_t n, const int64_t *j, Buffers<T> &buffers, T *radial, T *harmonics) const {
    const int64_t B = pairs.functions;
    std::fill(buffers.radial.begin(), buffers.radial.end(), T(0));
    for (int64_t l = 0; l <= pairs.degree; ++l)
      with_components(l, [&](auto count) { add_degree<decltype(count)::value, K>(slot, n, j, l, buffers, harmonics); });
    UNROLL
    for (int k = 0; k < K; ++k) std::copy_n(buffers.radial.data() + k * width, B, radial + (slot + k) * B);
  }
};

std::tuple<Tensor, Tensor> pair_gradient(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask,
                                         const Tensor &radial_, const Tensor &harmonics_,
                                         const MaybeTensor &tensor_weight, const MaybeTensor &scalar_weight_,
                                         const MaybeTensor &tensors_, const MaybeTensor &scalars_, const Tensor &g_) {
  const MaybeTensor scalar_weight = dense_rows(scalar_weight_);
  const Tensor radial = radial_.contiguous(), harmonics = harmonics_.contiguous(), g = *tiled(g_);
  const MaybeTensor tensors = tiled(tensors_), scalars = tiled(scalars_);
  const int64_t F = g_.size(2), width = (radial.size(2) + 7) / 8 * 8;
  check_pairs(row_atom, radial, harmonics, g_.size(1));
  check_features(tensors_, g_.size(0), F);
  check_features(scalars_, g_.size(0), F);
  const int64_t degree = degree_of(g_.size(1));
  const Degrees degrees = degrees_within(tensors_, scalars_, degree);
  check_weight(tensor_weight, degrees.count(), radial.size(2), F);
  check_weight(scalar_weight, scalars_.has_value() ? degree : 0, radial.size(2), F);
  Tensor for_radial = at::zeros_like(radial), for_harmonics = at::zeros_like(harmonics);
  const Tensor transposed_tensors = transposed_weight(tensor_weight, width);
  const Tensor transposed_scalars = transposed_weight(scalar_weight, width);
  const Layout layout = layout_of(row_atom, neighbours, mask, g_.size(0));
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "pair_gradient", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, harmonics, F);
    const Sides<scalar_t> sides{tiles_of<scalar_t>(tensors), tiles_of<scalar_t>(scalars), tiles_of<scalar_t>(g),
                                degrees};
    const auto weight = weights_of<scalar_t>(scalar_weight);
    const GradientOf<scalar_t> gradient{
        pairs, sides, weight, transposed_tensors.defined() ? transposed_tensors.const_data_ptr<scalar_t>() : nullptr,
        transposed_scalars.defined() ? transposed_scalars.const_data_ptr<scalar_t>() : nullptr, width};
    scalar_t *to_radial = for_radial.data_ptr<scalar_t>(), *to_harmonics = for_harmonics.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t, int64_t begin, int64_t end) {
      Buffers<scalar_t> buffers(F, width);
      for (int64_t n = begin; n < end; ++n)
        each_group(layout, n, [&](int64_t slot, auto size) {
          constexpr int K = decltype(size)::value;
          gradient.template group<K>(slot, n, layout.neighbours + slot, buffers, to_radial, to_harmonics);
        });
    });
  });
  return {for_radial, for_harmonics};
}

// sum[b] += sum_k radial[k][b] * products[k]
template <typename T, int K>
INLINE void add_outer(const Tile<T> (&products)[K], const T *radial, int64_t functions, Tile<T> *sum) {
  for (int64_t b = 0; b < functions; ++b) {
    Tile<T> held = sum[b];
    UNROLL
    for (int k = 0; k < K; ++k) held.add_product(products[k], radial[k * functions + b]);
    sum[b] = held;
  }
}

// Adds the outer products of the atoms of a thread to the weights [B, columns] of one path, whose products
// `make(slot, atom, neighbours, feature, held)` gives.
template <typename T, typename F>
INLINE void add_path(const Layout &layout, const Pairs<T> &pairs, int64_t begin, int64_t end, T *out, int64_t columns,
                     const F &make) {
  std::vector<Tile<T>> sum(pairs.functions);
  for (int64_t block = begin; block < end; block += kAtomBlock)
    for (int64_t f = 0; f < pairs.features; f += kTile) {
      for (int64_t b = 0; b < pairs.functions; ++b) sum[b] = Tile<T>::load(out + b * columns + f);
      for (int64_t n = block; n < std::min(end, block + kAtomBlock); ++n)
        each_group(layout, n, [&](int64_t slot, auto size) {
          Tile<T> held[decltype(size)::value];
          make(slot, n, layout.neighbours + slot, f, held);
          add_outer(held, pairs.radial + slot * pairs.functions, pairs.functions, sum.data());
        });
      for (int64_t b = 0; b < pairs.functions; ++b) sum[b].store(out + b * columns + f);
    }
}

template <typename T>
void add_weights(const Layout &layout, const Pairs<T> &pairs, const Sides<T> &sides, int64_t begin, int64_t end,
                 T *for_tensors, int64_t tensor_columns, T *for_scalars, int64_t scalar_columns) {
  const int64_t F = pairs.features;
  for (int64_t l = 0; l <= pairs.degree; ++l)
    with_components(l, [&](auto count) {
      constexpr int C = decltype(count)::value;
      if (sides.has_tensors(l))
        add_path(layout, pairs, begin, end, for_tensors + sides.degrees.place(l) * F, tensor_columns,
                 [&](int64_t, int64_t n, const int64_t *j, int64_t f, auto &held) {
                   tensor_products<T, C>(sides, n, j, l, f, held);
                 });
      if (sides.has_scalars(l))
        add_path(layout, pairs, begin, end, for_scalars + (l - 1) * F, scalar_columns,
                 [&](int64_t slot, int64_t n, const int64_t *j, int64_t f, auto &held) {
                   scalar_products<T, C>(sides, pairs, slot, n, j, l, f, held);
                 });
    });
}

std::tuple<Tensor, Tensor> pair_weight_gradient(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask,
                                                const Tensor &radial_, const Tensor &harmonics_,
                                                const MaybeTensor &tensors_, const MaybeTensor &scalars_,
                                                const Tensor &g_) {
  const Tensor radial = radial_.contiguous(), harmonics = harmonics_.contiguous(), g = *tiled(g_);
  const MaybeTensor tensors = tiled(tensors_), scalars = tiled(scalars_);
  const int64_t F = g_.size(2), B = radial.size(2), degree = degree_of(g_.size(1));
  check_pairs(row_atom, radial, harmonics, g_.size(1));
  check_features(tensors_, g_.size(0), F);
  check_features(scalars_, g_.size(0), F);
  const Degrees degrees = degrees_within(tensors_, scalars_, degree);
  const Layout layout = layout_of(row_atom, neighbours, mask, g_.size(0));
  const int64_t parts = layout.cuts.size() - 1;
  const int64_t tensor_columns = degrees.count() * F;
  const int64_t scalar_columns = scalars.has_value() ? degree * F : 0;
  Tensor for_tensors = at::zeros({parts, B, tensor_columns}, g.options());
  Tensor for_scalars = at::zeros({parts, B, scalar_columns}, g.options());
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "pair_weight_gradient", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, harmonics, F);
    const Sides<scalar_t> sides{tiles_of<scalar_t>(tensors), tiles_of<scalar_t>(scalars), tiles_of<scalar_t>(g),
                                degrees};
    scalar_t *to_tensors = for_tensors.data_ptr<scalar_t>(), *to_scalars = for_scalars.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t part, int64_t begin, int64_t end) {
      add_weights(layout, pairs, sides, begin, end, to_tensors + part * B * tensor_columns, tensor_columns,
                  to_scalars + part * B * scalar_columns, scalar_columns);
    });
  });
  // In the order of the parts: the same sum at every run with as many threads.
  return {for_tensors.sum(0), for_scalars.sum(0)};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("pair_gradient(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor harmonics, "
              "Tensor? tensor_weight, Tensor? scalar_weight, Tensor? tensors, Tensor? scalars, Tensor g) -> (Tensor, "
              "Tensor)");
  library.def("pair_weight_gradient(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor harmonics, "
              "Tensor? tensors, Tensor? scalars, Tensor g) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("pair_gradient", &pair_gradient);
  library.impl("pair_weight_gradient", &pair_weight_gradient);
}
