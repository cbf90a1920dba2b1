// Sums over neighbour slots of node features times filters that are made where they are used.
//
// The form behind all four operators, over the slots of each atom n with neighbour j and over degrees l = 0 ... L:
//   T = sum w_l g_l[n] . x_l[j] + v_l (g_l[n] . Y_l) d_l[j],  w_l = sum_b radial_b W_l[b],  v_l = sum_b radial_b V_l[b]
// with tensors x [A, (L + 1)^2, F] (or those of a lower degree, or without degree 0), scalars d [A, L, F] for degrees 1
// to L, factors of the result g [A, (L + 1)^2, F] and harmonics Y of degrees 1 to L. It is linear in each of radial, Y,
// (W, V), (x, d) and g; an operator is its derivative with respect to one of them. The list of neighbours is full,
// radial is the same on both slots of a pair and Y_l(-u) = (-1)^l Y_l(u), so the derivative with respect to (x, d) is a
// sum over an atom's own slots too: no scatter, no atomics.
//
// Filters [slots, F] for each path, which a plain implementation writes to memory and reads again, stay in registers.

#include "form.h"

namespace {

// Node features that are summed, and the weights of their filters: (x, d), or (g, g) for the transposed sums.
template <typename T> struct Summed {
  Tiles<T> tensors, scalars;
  Weights<T> tensor_weight, scalar_weight;
  Degrees degrees; // of the tensors
};

// Adds a group of slots to the sums of their atom, for one degree and tile of features.
template <typename T, int C, int K>
INLINE void add_group(const Pairs<T> &pairs, const Summed<T> &in, int64_t slot, const int64_t *j, int64_t degree,
                      int64_t f, Tile<T> (&sum)[C]) {
  const int64_t F = pairs.features, B = pairs.functions;
  Tile<T> w[K];
  if (in.degrees.hold(degree)) {
    const T *weight = in.tensor_weight.data + in.degrees.place(degree) * F + f;
    filters(pairs.radial + slot * B, B, weight, in.tensor_weight.stride, w);
    UNROLL
    for (int k = 0; k < K; ++k) {
      const T *row = in.tensors.at(j[k], in.degrees.component(degree), f);
      UNROLL
      for (int c = 0; c < C; ++c) sum[c].add_product(w[k], Tile<T>::load(row + c * kTile));
    }
  }
  if (in.scalars && degree > 0) {
    filters(pairs.radial + slot * B, B, in.scalar_weight.data + (degree - 1) * F + f, in.scalar_weight.stride, w);
    UNROLL
    for (int k = 0; k < K; ++k) {
      const Tile<T> part = w[k].times(Tile<T>::load(in.scalars.at(j[k], degree - 1, f)));
      const T *harmonics = pairs.of(slot + k, degree);
      UNROLL
      for (int c = 0; c < C; ++c) sum[c].add_product(part, harmonics[c]);
    }
  }
}

// The same for the transposed sums: sum[0 ... C - 1] of tensors and sum[C] of scalars.
template <typename T, int C, int K>
INLINE void add_group_transposed(const Pairs<T> &pairs, const Summed<T> &in, int64_t slot, const int64_t *j,
                                 int64_t degree, int64_t f, Tile<T> (&sum)[C + 1]) {
  const int64_t F = pairs.features, B = pairs.functions;
  Tile<T> w[K];
  if (in.degrees.hold(degree)) {
    const T *weight = in.tensor_weight.data + in.degrees.place(degree) * F + f;
    filters(pairs.radial + slot * B, B, weight, in.tensor_weight.stride, w);
    UNROLL
    for (int k = 0; k < K; ++k) {
      const T *row = in.tensors.at(j[k], degree * degree, f);
      UNROLL
      for (int c = 0; c < C; ++c) sum[c].add_product(w[k], Tile<T>::load(row + c * kTile));
    }
  }
  if (in.scalars && degree > 0) {
    filters(pairs.radial + slot * B, B, in.scalar_weight.data + (degree - 1) * F + f, in.scalar_weight.stride, w);
    const T sign = degree % 2 ? -1 : 1; // of the harmonics of the opposite pair
    UNROLL
    for (int k = 0; k < K; ++k) {
      const T *row = in.scalars.at(j[k], degree * degree, f);
      const T *harmonics = pairs.of(slot + k, degree);
      Tile<T> part = Tile<T>::zero();
      UNROLL
      for (int c = 0; c < C; ++c) part.add_product(Tile<T>::load(row + c * kTile), sign * harmonics[c]);
      sum[C].add_product(w[k], part);
    }
  }
}

// Calls work(atom, first feature) for the atoms of a thread; filters' weights stay in the cache for a block of atoms.
template <typename F> INLINE void each_tile(int64_t begin, int64_t end, int64_t features, const F &work) {
  for (int64_t block = begin; block < end; block += kAtomBlock)
    for (int64_t f = 0; f < features; f += kTile)
      for (int64_t n = block; n < std::min(end, block + kAtomBlock); ++n) work(n, f);
}

template <typename T>
void sum_slots(const Layout &layout, const Pairs<T> &pairs, const Summed<T> &in, int64_t begin, int64_t end, T *out) {
  const int64_t F = pairs.features, components = pairs.components + 1;
  for (int64_t degree = 0; degree <= pairs.degree; ++degree)
    with_components(degree, [&](auto count) {
      constexpr int C = decltype(count)::value;
      each_tile(begin, end, F, [&](int64_t n, int64_t f) {
        Tile<T> sum[C];
        UNROLL
        for (int c = 0; c < C; ++c) sum[c] = Tile<T>::zero();
        each_group(layout, n, [&](int64_t slot, auto size) {
          add_group<T, C, decltype(size)::value>(pairs, in, slot, layout.neighbours + slot, degree, f, sum);
        });
        T *to = out + (n * components + degree * degree) * F + f;
        UNROLL
        for (int c = 0; c < C; ++c) sum[c].store(to + c * F);
      });
    });
}

template <typename T>
void sum_slots_transposed(const Layout &layout, const Pairs<T> &pairs, const Summed<T> &in, int64_t begin, int64_t end,
                          int64_t components, T *tensors, T *scalars) {
  const int64_t F = pairs.features;
  for (int64_t degree = 0; degree <= pairs.degree; ++degree)
    with_components(degree, [&](auto count) {
      constexpr int C = decltype(count)::value;
      const bool with_tensors = in.degrees.hold(degree), with_scalars = in.scalars && degree > 0;
      if (!with_tensors && !with_scalars) return;
      each_tile(begin, end, F, [&](int64_t n, int64_t f) {
        Tile<T> sum[C + 1];
        UNROLL
        for (int c = 0; c <= C; ++c) sum[c] = Tile<T>::zero();
        each_group(layout, n, [&](int64_t slot, auto size) {
          add_group_transposed<T, C, decltype(size)::value>(pairs, in, slot, layout.neighbours + slot, degree, f, sum);
        });
        T *to = tensors + (n * components + in.degrees.component(degree)) * F + f;
        for (int c = 0; with_tensors && c < C; ++c) sum[c].store(to + c * F);
        if (with_scalars) sum[C].store(scalars + (n * pairs.degree + degree - 1) * F + f);
      });
    });
}

Tensor pair_sum(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask, const Tensor &radial_,
                const Tensor &harmonics_, const MaybeTensor &tensor_weight_, const MaybeTensor &scalar_weight_,
                const MaybeTensor &tensors_, const MaybeTensor &scalars_) {
  const MaybeTensor tensor_weight = dense_rows(tensor_weight_), scalar_weight = dense_rows(scalar_weight_);
  const Tensor radial = radial_.contiguous(), harmonics = harmonics_.contiguous();
  TORCH_CHECK(tensors_.has_value() || scalars_.has_value(), "a sum needs tensors or scalars");
  const Tensor &features = tensors_.has_value() ? *tensors_ : *scalars_;
  const MaybeTensor tensors = tiled(tensors_), scalars = tiled(scalars_);
  const int64_t atoms = features.size(0), F = features.size(2);
  Tensor out = at::empty({atoms, harmonics.size(2) + 1, F}, features.options());
  check_pairs(row_atom, radial, harmonics, out.size(1));
  check_features(tensors_, atoms, F);
  check_features(scalars_, atoms, F);
  const int64_t degree = degree_of(out.size(1));
  const Degrees degrees = degrees_within(tensors_, scalars_, degree);
  check_weight(tensor_weight, degrees.count(), radial.size(2), F);
  check_weight(scalar_weight, scalars_.has_value() ? degree : 0, radial.size(2), F);
  const Layout layout = layout_of(row_atom, neighbours, mask, atoms);
  AT_DISPATCH_FLOATING_TYPES(features.scalar_type(), "pair_sum", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, harmonics, F);
    const Summed<scalar_t> in{tiles_of<scalar_t>(tensors), tiles_of<scalar_t>(scalars),
                              weights_of<scalar_t>(tensor_weight), weights_of<scalar_t>(scalar_weight),
                              degrees};
    scalar_t *to = out.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t, int64_t begin, int64_t end) { sum_slots(layout, pairs, in, begin, end, to); });
  });
  return out;
}

std::tuple<Tensor, Tensor> pair_sum_transposed(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask,
                                               const Tensor &radial_, const Tensor &harmonics_,
                                               const MaybeTensor &tensor_weight_, const MaybeTensor &scalar_weight_,
                                               const Tensor &g_, int64_t components) {
  const MaybeTensor tensor_weight = dense_rows(tensor_weight_), scalar_weight = dense_rows(scalar_weight_);
  const Tensor radial = radial_.contiguous(), harmonics = harmonics_.contiguous(), g = *tiled(g_);
  const int64_t atoms = g_.size(0), F = g_.size(2);
  Tensor tensors = at::empty({atoms, components, F}, g.options());
  const Layout layout = layout_of(row_atom, neighbours, mask, atoms);
  const int64_t degrees = scalar_weight.has_value() ? degree_of(g_.size(1)) : 0;
  Tensor scalars = at::empty({atoms, degrees, F}, g.options());
  check_pairs(row_atom, radial, harmonics, g_.size(1));
  const MaybeTensor summed = components ? MaybeTensor(tensors) : MaybeTensor();
  const Degrees of_tensors = degrees_within(summed, {}, degree_of(g_.size(1)));
  check_weight(tensor_weight, of_tensors.count(), radial.size(2), F);
  check_weight(scalar_weight, degrees, radial.size(2), F);
  AT_DISPATCH_FLOATING_TYPES(g.scalar_type(), "pair_sum_transposed", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, harmonics, F);
    const auto tiles = tiles_of<scalar_t>(g);
    const Summed<scalar_t> in{components ? tiles : Tiles<scalar_t>(), degrees ? tiles : Tiles<scalar_t>(),
                              weights_of<scalar_t>(tensor_weight), weights_of<scalar_t>(scalar_weight),
                              of_tensors};
    scalar_t *to_tensors = tensors.data_ptr<scalar_t>(), *to_scalars = scalars.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t, int64_t begin, int64_t end) {
      sum_slots_transposed(layout, pairs, in, begin, end, components, to_tensors, to_scalars);
    });
  });
  return {tensors, scalars};
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("pair_sum(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor harmonics, "
              "Tensor? tensor_weight, Tensor? scalar_weight, Tensor? tensors, Tensor? scalars) -> Tensor");
  library.def("pair_sum_transposed(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor harmonics, "
              "Tensor? tensor_weight, Tensor? scalar_weight, Tensor g, int components) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("pair_sum", &pair_sum);
  library.impl("pair_sum_transposed", &pair_sum_transposed);
}
