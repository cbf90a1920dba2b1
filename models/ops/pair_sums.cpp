// Sums over neighbour slots of node features times filters that are made where they are used.
//
// The form behind all four operators, with rows r of K = 8 slots k, the row's atom n and the slot's neighbour j:
//   T = sum_{r,k,f} [ w1 gs[n] s[j] + w2 sum_d gv[n,d] y[j,d] + w3 d[j] sum_d u_d gv[n,d] ],  w_p = sum_b radial_b W_p[b]
// It is linear in each of radial, u (directions), W, (s, y, d) and (gs, gv); an operator is its derivative with respect
// to one of them. The list of neighbours is full, radial is the same on both slots of a pair and u changes sign, so the
// derivative with respect to (s, y, d) is a sum over an atom's own slots too: no scatter, no atomics.
//
// Filters [slots, 3 F], which a plain implementation writes to memory and reads again, stay in registers.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int kSlots = 8;
constexpr int kTile = 16;      // features that a filter is made for at a time
constexpr int kAtomBlock = 32; // atoms whose radial functions stay in the cache over the tiles

template <typename T> struct Lanes;
template <> struct Lanes<float> {
  typedef float Tile __attribute__((vector_size(64)));
  typedef float Eight __attribute__((vector_size(32)));
};
template <> struct Lanes<double> {
  typedef double Tile __attribute__((vector_size(128)));
  typedef double Eight __attribute__((vector_size(64)));
};

template <typename V, typename T> inline V load(const T *from) {
  V value;
  __builtin_memcpy(&value, from, sizeof(V));
  return value;
}

template <typename V, typename T> inline void store(T *to, const V &value) { __builtin_memcpy(to, &value, sizeof(V)); }

// Rows of node features: a pointer and the distance between the rows of two atoms; null if the path is left out.
template <typename T> struct Rows {
  const T *data = nullptr;
  int64_t stride = 0;
  const T *at(int64_t atom) const { return data + atom * stride; }
  explicit operator bool() const { return data != nullptr; }
};

template <typename T> Rows<T> rows_of(const MaybeTensor &x) {
  if (!x.has_value() || !x->defined()) return {};
  TORCH_CHECK(x->stride(-1) == 1 && (x->dim() == 2 || x->stride(1) == x->size(2)), "features must be dense in a row");
  return {x->const_data_ptr<T>(), x->stride(0)};
}

struct Layout {
  int64_t atoms, rows;
  const int64_t *neighbours;
  std::vector<int64_t> first_row; // of each atom, and the number of rows at the end
  std::vector<uint8_t> filled;    // slots of each row up to its last one that holds a pair
  std::vector<int64_t> cuts;      // atoms at which the work is cut into equal parts, one for each thread
};

// What follows trusts these; a wrong batch must not write where it likes.
void check_owners(const int64_t *owner, int64_t rows, int64_t atoms) {
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK(owner[r] >= (r ? owner[r - 1] : 0) && owner[r] < atoms, "rows must be in the order of their atoms");
}

Layout layout_of(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask, int64_t atoms) {
  TORCH_CHECK(neighbours.size(1) == kSlots, "rows must have 8 slots");
  Layout out{atoms, row_atom.size(0), neighbours.const_data_ptr<int64_t>(), {}, {}, {}};
  const int64_t *owner = row_atom.const_data_ptr<int64_t>();
  const bool *holds = mask.const_data_ptr<bool>();
  check_owners(owner, out.rows, atoms);
  out.first_row.assign(atoms + 1, 0);
  out.filled.resize(out.rows);
  int64_t work = 0;
  for (int64_t r = 0; r < out.rows; ++r) {
    out.first_row[owner[r] + 1] += 1;
    int filled = 0;
    for (int k = 0; k < kSlots; ++k)
      if (holds[r * kSlots + k]) filled = k + 1;
    out.filled[r] = filled;
    work += filled > 0;
  }
  for (int64_t n = 0; n < atoms; ++n) out.first_row[n + 1] += out.first_row[n];
  const int64_t parts = at::get_num_threads();
  int64_t done = 0;
  out.cuts.push_back(0);
  for (int64_t n = 0; n < atoms; ++n) {
    if (done * parts >= work * (int64_t)out.cuts.size() && (int64_t)out.cuts.size() < parts) out.cuts.push_back(n);
    for (int64_t r = out.first_row[n]; r < out.first_row[n + 1]; ++r) done += out.filled[r] > 0;
  }
  while ((int64_t)out.cuts.size() <= parts) out.cuts.push_back(atoms);
  return out;
}

template <typename F> void each_part(const Layout &layout, const F &work) {
  const int64_t parts = layout.cuts.size() - 1;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part, layout.cuts[part], layout.cuts[part + 1]);
  });
}

// w[p][k] = sum_b radial[k][b] * weight[b][p * F + tile], for P of the three paths at once.
template <typename T, int P, int K>
inline void filters(const T *radial, int64_t functions, const T *const (&weight)[P], int64_t stride,
                    typename Lanes<T>::Tile (&w)[P][K]) {
  using Tile = typename Lanes<T>::Tile;
  for (int p = 0; p < P; ++p)
    for (int k = 0; k < K; ++k) w[p][k] = Tile{};
  for (int64_t b = 0; b < functions; ++b) {
    Tile row[P];
    for (int p = 0; p < P; ++p) row[p] = load<Tile>(weight[p] + b * stride);
    for (int k = 0; k < K; ++k) {
      const T value = radial[k * functions + b];
      for (int p = 0; p < P; ++p) w[p][k] += row[p] * value;
    }
  }
}

template <typename T> struct Pairs {
  const T *radial, *directions, *weight; // [rows, 8, B], [rows, 8, 3], [B, 3 F]
  int64_t functions, features;
};

// Adds one row's slots to the sums of its atom for one tile of features.
template <typename T, int P, int K, bool kTransposed>
inline void add_row(const Pairs<T> &pairs, int64_t r, const int64_t *neighbours, int64_t f, const int (&paths)[P],
                    const Rows<T> &one, const Rows<T> &three, const Rows<T> &lone,
                    typename Lanes<T>::Tile (&sum)[5]) {
  using Tile = typename Lanes<T>::Tile;
  const int64_t F = pairs.features, B = pairs.functions;
  const T *weight[P];
  for (int p = 0; p < P; ++p) weight[p] = pairs.weight + paths[p] * F + f;
  Tile w[P][K];
  filters<T, P, K>(pairs.radial + r * kSlots * B, B, weight, 3 * F, w);
  const T *u = pairs.directions + r * kSlots * 3;
  for (int k = 0; k < K; ++k) {
    const int64_t j = neighbours[r * kSlots + k];
    for (int p = 0; p < P; ++p) {
      if (paths[p] == 0) {
        sum[0] += w[p][k] * load<Tile>(one.at(j) + f);
      } else if (paths[p] == 1) {
        for (int d = 0; d < 3; ++d) sum[1 + d] += w[p][k] * load<Tile>(three.at(j) + d * F + f);
      } else if (!kTransposed) {
        const Tile part = w[p][k] * load<Tile>(lone.at(j) + f);
        for (int d = 0; d < 3; ++d) sum[1 + d] += part * u[k * 3 + d];
      } else {
        Tile part = load<Tile>(three.at(j) + f) * u[k * 3];
        for (int d = 1; d < 3; ++d) part += load<Tile>(three.at(j) + d * F + f) * u[k * 3 + d];
        sum[4] -= w[p][k] * part; // the direction of the opposite pair
      }
    }
  }
}

// Sums over the slots of every atom: (s, y, d) -> (ds, dv), or transposed (gs, gv) -> (s', y', d').
template <typename T, int P, bool kTransposed>
void sum_slots(const Layout &layout, const Pairs<T> &pairs, const int (&paths)[P], const Rows<T> &one,
               const Rows<T> &three, const Rows<T> &lone, T *const (&out)[5], const int64_t (&out_stride)[5]) {
  using Tile = typename Lanes<T>::Tile;
  each_part(layout, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block += kAtomBlock)
      for (int64_t f = 0; f < pairs.features; f += kTile)
        for (int64_t n = block; n < std::min(end, block + kAtomBlock); ++n) {
          Tile sum[5] = {};
          for (int64_t r = layout.first_row[n]; r < layout.first_row[n + 1]; ++r) {
            if (layout.filled[r] > 4)
              add_row<T, P, 8, kTransposed>(pairs, r, layout.neighbours, f, paths, one, three, lone, sum);
            else if (layout.filled[r] > 0)
              add_row<T, P, 4, kTransposed>(pairs, r, layout.neighbours, f, paths, one, three, lone, sum);
          }
          for (int c = 0; c < 5; ++c)
            if (out[c] != nullptr) store(out[c] + n * out_stride[c] + f, sum[c]);
        }
  });
}

template <typename T, bool kTransposed>
void sum_paths(const Layout &layout, const Pairs<T> &pairs, bool first, bool second, bool third, const Rows<T> &one,
               const Rows<T> &three, const Rows<T> &lone, T *const (&out)[5], const int64_t (&stride)[5]) {
#define RUN(P, ...)                                                                                                  \
  do {                                                                                                               \
    const int paths[P] = {__VA_ARGS__};                                                                              \
    sum_slots<T, P, kTransposed>(layout, pairs, paths, one, three, lone, out, stride);                               \
  } while (false)
  if (first && second && third) RUN(3, 0, 1, 2);
  else if (first && third) RUN(2, 0, 2);
  else if (first && second) RUN(2, 0, 1);
  else if (second && third) RUN(2, 1, 2);
  else if (first) RUN(1, 0);
  else if (second) RUN(1, 1);
  else if (third) RUN(1, 2);
#undef RUN
}

template <typename T> Pairs<T> pairs_of(const Tensor &radial, const Tensor &directions, const Tensor &weight) {
  TORCH_CHECK(radial.is_contiguous() && directions.is_contiguous() && weight.is_contiguous(), "pairs must be dense");
  const int64_t features = weight.size(1) / 3;
  TORCH_CHECK(features % kTile == 0, "features must be a multiple of 16");
  return {radial.const_data_ptr<T>(), directions.const_data_ptr<T>(), weight.const_data_ptr<T>(), radial.size(2),
          features};
}

std::tuple<Tensor, Tensor> pair_sum(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask,
                                    const Tensor &radial_, const Tensor &directions_, const Tensor &weight_,
                                    const MaybeTensor &s, const MaybeTensor &y, const MaybeTensor &d, int64_t atoms) {
  const Tensor radial = radial_.contiguous(), directions = directions_.contiguous(), weight = weight_.contiguous();
  const int64_t F = weight.size(1) / 3;
  Tensor scalars = at::empty({atoms, F}, weight.options()), vectors = at::empty({atoms, 3, F}, weight.options());
  const Layout layout = layout_of(row_atom, neighbours, mask, atoms);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "pair_sum", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, directions, weight);
    const auto one = rows_of<scalar_t>(s), three = rows_of<scalar_t>(y), lone = rows_of<scalar_t>(d);
    scalar_t *v = vectors.data_ptr<scalar_t>();
    scalar_t *const out[5] = {scalars.data_ptr<scalar_t>(), v, v + F, v + 2 * F, nullptr};
    sum_paths<scalar_t, false>(layout, pairs, bool(one), bool(three), bool(lone), one, three, lone, out,
                               {F, 3 * F, 3 * F, 3 * F, 0});
  });
  return {scalars, vectors};
}

std::tuple<Tensor, Tensor, Tensor> pair_sum_transposed(const Tensor &row_atom, const Tensor &neighbours,
                                                       const Tensor &mask, const Tensor &radial_,
                                                       const Tensor &directions_, const Tensor &weight_,
                                                       const MaybeTensor &gs, const Tensor &gv, bool with_vectors) {
  const Tensor radial = radial_.contiguous(), directions = directions_.contiguous(), weight = weight_.contiguous();
  const int64_t F = weight.size(1) / 3, atoms = gv.size(0);
  Tensor s = at::empty({gs.has_value() ? atoms : 0, F}, weight.options());
  Tensor y = at::empty({with_vectors ? atoms : 0, 3, F}, weight.options());
  Tensor d = at::empty({atoms, F}, weight.options());
  const Layout layout = layout_of(row_atom, neighbours, mask, atoms);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "pair_sum_transposed", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, directions, weight);
    const auto one = rows_of<scalar_t>(gs), three = rows_of<scalar_t>(gv);
    scalar_t *v = with_vectors ? y.data_ptr<scalar_t>() : nullptr;
    scalar_t *const out[5] = {one ? s.data_ptr<scalar_t>() : nullptr, v, v ? v + F : v, v ? v + 2 * F : v,
                              d.data_ptr<scalar_t>()};
    sum_paths<scalar_t, true>(layout, pairs, bool(one), with_vectors, true, one, three, {}, out,
                              {F, 3 * F, 3 * F, 3 * F, F});
  });
  return {s, y, d};
}

// Products of what a slot's two atoms hold, for all features: [path][slot][F].
template <typename T> struct Products {
  Rows<T> s, y, d, gs, gv;
  int64_t features;

  template <int K>
  inline void tile(int path, int64_t n, const int64_t *j, const T *u, int64_t f, typename Lanes<T>::Tile *out) const {
    using Tile = typename Lanes<T>::Tile;
    const int64_t F = features;
    if (path == 0) {
      const Tile own = load<Tile>(gs.at(n) + f);
      for (int k = 0; k < K; ++k) out[k] = own * load<Tile>(s.at(j[k]) + f);
      return;
    }
    const T *own = gv.at(n) + f;
    const Tile v0 = load<Tile>(own), v1 = load<Tile>(own + F), v2 = load<Tile>(own + 2 * F);
    for (int k = 0; k < K; ++k) {
      if (path == 1) {
        const T *row = y.at(j[k]) + f;
        out[k] = v0 * load<Tile>(row) + v1 * load<Tile>(row + F) + v2 * load<Tile>(row + 2 * F);
      } else {
        out[k] = (v0 * u[k * 3] + v1 * u[k * 3 + 1] + v2 * u[k * 3 + 2]) * load<Tile>(d.at(j[k]) + f);
      }
    }
  }

  template <int K> void fill(int path, int64_t n, const int64_t *j, const T *u, T *out) const {
    for (int64_t f = 0; f < features; f += kTile) {
      typename Lanes<T>::Tile held[K];
      tile<K>(path, n, j, u, f, held);
      for (int k = 0; k < K; ++k) store(out + k * features + f, held[k]);
    }
  }
};

// out[k][b] += sum_f products[k][f] * weight[f][b], for N blocks of 8 radial functions.
template <typename T, int N, int K>
inline void contract(const T *products, const T *weight, int64_t features, int64_t width, T *out) {
  using Eight = typename Lanes<T>::Eight;
  Eight sum[N][K];
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < K; ++k) sum[i][k] = load<Eight>(out + k * width + 8 * i);
  for (int64_t f = 0; f < features; ++f) {
    Eight row[N];
    for (int i = 0; i < N; ++i) row[i] = load<Eight>(weight + f * width + 8 * i);
    for (int k = 0; k < K; ++k) {
      const T value = products[k * features + f];
      for (int i = 0; i < N; ++i) sum[i][k] += row[i] * value;
    }
  }
  for (int i = 0; i < N; ++i)
    for (int k = 0; k < K; ++k) store(out + k * width + 8 * i, sum[i][k]);
}

template <typename T, int K>
inline void contract_all(const T *products, const T *weight, int64_t features, int64_t width, T *out) {
  int64_t b = 0;
  for (; b + 24 <= width; b += 24) contract<T, 3, K>(products, weight + b, features, width, out + b);
  for (; b + 16 <= width; b += 16) contract<T, 2, K>(products, weight + b, features, width, out + b);
  for (; b + 8 <= width; b += 8) contract<T, 1, K>(products, weight + b, features, width, out + b);
}

// Derivative with respect to the directions: sum_f w3[k] d[j] gv[n][c].
template <typename T, int K>
inline void turn(const Pairs<T> &pairs, int64_t r, const int64_t *j, int64_t n, const Rows<T> &d, const Rows<T> &gv,
                 T *out) {
  using Tile = typename Lanes<T>::Tile;
  const int64_t F = pairs.features, B = pairs.functions;
  Tile sum[K][3] = {};
  for (int64_t f = 0; f < F; f += kTile) {
    const T *const weight[1] = {pairs.weight + 2 * F + f};
    Tile w[1][K];
    filters<T, 1, K>(pairs.radial + r * kSlots * B, B, weight, 3 * F, w);
    for (int k = 0; k < K; ++k) {
      const Tile part = w[0][k] * load<Tile>(d.at(j[k]) + f);
      for (int c = 0; c < 3; ++c) sum[k][c] += part * load<Tile>(gv.at(n) + c * F + f);
    }
  }
  for (int k = 0; k < K; ++k)
    for (int c = 0; c < 3; ++c) {
      T total = 0;
      for (int lane = 0; lane < kTile; ++lane) total += sum[k][c][lane];
      out[k * 3 + c] = total;
    }
}

template <typename T, int K>
inline void row_gradient(const Pairs<T> &pairs, const Products<T> &products, const T *transposed, int64_t width,
                         const int64_t *neighbours, int64_t n, int64_t r, T *buffer, T *for_radial, T *for_directions) {
  const int64_t F = pairs.features, B = pairs.functions;
  const int64_t *j = neighbours + r * kSlots;
  T *sums = buffer + kSlots * F;
  std::fill(sums, sums + kSlots * width, T(0));
  const bool has[3] = {bool(products.s), bool(products.y), true};
  for (int p = 0; p < 3; ++p) {
    if (!has[p]) continue;
    products.template fill<K>(p, n, j, pairs.directions + r * kSlots * 3, buffer);
    contract_all<T, K>(buffer, transposed + p * F * width, F, width, sums);
  }
  for (int k = 0; k < K; ++k) std::copy_n(sums + k * width, B, for_radial + (r * kSlots + k) * B);
  turn<T, K>(pairs, r, j, n, products.d, products.gv, for_directions + r * kSlots * 3);
}

std::tuple<Tensor, Tensor> pair_gradient(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask,
                                         const Tensor &radial_, const Tensor &directions_, const Tensor &weight_,
                                         const MaybeTensor &s, const MaybeTensor &y, const Tensor &d,
                                         const MaybeTensor &gs, const Tensor &gv) {
  const Tensor radial = radial_.contiguous(), directions = directions_.contiguous(), weight = weight_.contiguous();
  const int64_t F = weight.size(1) / 3, B = weight.size(0), width = (B + 7) / 8 * 8;
  Tensor for_radial = at::zeros_like(radial), for_directions = at::zeros_like(directions);
  Tensor transposed = at::zeros({3 * F, width}, weight.options());
  transposed.narrow(1, 0, B).copy_(weight.t());
  const Layout layout = layout_of(row_atom, neighbours, mask, gv.size(0));
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "pair_gradient", [&] {
    const auto pairs = pairs_of<scalar_t>(radial, directions, weight);
    const Products<scalar_t> products{rows_of<scalar_t>(s),  rows_of<scalar_t>(y),  rows_of<scalar_t>(d),
                                      rows_of<scalar_t>(gs), rows_of<scalar_t>(gv), F};
    const scalar_t *turned = transposed.const_data_ptr<scalar_t>();
    scalar_t *radial_out = for_radial.data_ptr<scalar_t>(), *directions_out = for_directions.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t, int64_t begin, int64_t end) {
      std::vector<scalar_t> buffer(kSlots * (F + width));
      for (int64_t n = begin; n < end; ++n)
        for (int64_t r = layout.first_row[n]; r < layout.first_row[n + 1]; ++r) {
          if (layout.filled[r] > 4)
            row_gradient<scalar_t, 8>(pairs, products, turned, width, layout.neighbours, n, r, buffer.data(), radial_out,
                                      directions_out);
          else if (layout.filled[r] > 0)
            row_gradient<scalar_t, 4>(pairs, products, turned, width, layout.neighbours, n, r, buffer.data(), radial_out,
                                      directions_out);
        }
    });
  });
  return {for_radial, for_directions};
}

// sum[b] += sum_k radial[k][b] * product[k] for one path and tile of features of a row.
template <typename T, int K>
inline void add_outer(const Products<T> &products, int path, int64_t n, const int64_t *j, const T *u, int64_t f,
                      const T *radial, int64_t functions, typename Lanes<T>::Tile *sum) {
  using Tile = typename Lanes<T>::Tile;
  Tile held[K];
  products.template tile<K>(path, n, j, u, f, held);
  for (int64_t b = 0; b < functions; ++b) {
    Tile low = sum[b], high = Tile{};
    for (int k = 0; k < K; k += 2) {
      low += held[k] * radial[k * functions + b];
      high += held[k + 1] * radial[(k + 1) * functions + b];
    }
    sum[b] = low + high;
  }
}

Tensor pair_weight_gradient(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask, const Tensor &radial_,
                            const Tensor &directions_, const MaybeTensor &s, const MaybeTensor &y, const Tensor &d,
                            const MaybeTensor &gs, const Tensor &gv) {
  const Tensor radial = radial_.contiguous(), directions = directions_.contiguous();
  const int64_t F = gv.size(2), B = radial.size(2);
  TORCH_CHECK(F % kTile == 0, "features must be a multiple of 16");
  const Layout layout = layout_of(row_atom, neighbours, mask, gv.size(0));
  const int64_t parts = layout.cuts.size() - 1;
  Tensor sums = at::zeros({parts, B, 3 * F}, gv.options());
  AT_DISPATCH_FLOATING_TYPES(gv.scalar_type(), "pair_weight_gradient", [&] {
    const Products<scalar_t> products{rows_of<scalar_t>(s),  rows_of<scalar_t>(y),  rows_of<scalar_t>(d),
                                      rows_of<scalar_t>(gs), rows_of<scalar_t>(gv), F};
    const bool has[3] = {bool(products.s), bool(products.y), true};
    const scalar_t *functions = radial.const_data_ptr<scalar_t>(), *u = directions.const_data_ptr<scalar_t>();
    scalar_t *all = sums.data_ptr<scalar_t>();
    each_part(layout, [&](int64_t part, int64_t begin, int64_t end) {
      std::vector<typename Lanes<scalar_t>::Tile> sum(B);
      scalar_t *out = all + part * B * 3 * F;
      for (int64_t block = begin; block < end; block += kAtomBlock)
        for (int p = 0; p < 3; ++p)
          for (int64_t f = 0; has[p] && f < F; f += kTile) {
            scalar_t *place = out + p * F + f;
            for (int64_t b = 0; b < B; ++b) sum[b] = load<typename Lanes<scalar_t>::Tile>(place + b * 3 * F);
            for (int64_t n = block; n < std::min(end, block + kAtomBlock); ++n)
              for (int64_t r = layout.first_row[n]; r < layout.first_row[n + 1]; ++r) {
                const int64_t *j = layout.neighbours + r * kSlots;
                const scalar_t *row = u + r * kSlots * 3, *values = functions + r * kSlots * B;
                if (layout.filled[r] > 4) add_outer<scalar_t, 8>(products, p, n, j, row, f, values, B, sum.data());
                else if (layout.filled[r] > 0) add_outer<scalar_t, 4>(products, p, n, j, row, f, values, B, sum.data());
              }
            for (int64_t b = 0; b < B; ++b) store(place + b * 3 * F, sum[b]);
          }
    });
  });
  return sums.sum(0); // in the order of the parts: the same sum at every run with as many threads
}

// Sums over the rows of each atom: rows [rows, C], slots [rows * K, C], or the slots that each row's slots name.
Tensor segment_sum(const Tensor &row_atom, const Tensor &values_, const MaybeTensor &opposite, int64_t atoms) {
  const Tensor values = values_.contiguous();
  const int64_t rows = row_atom.size(0), columns = values.size(1), slots = rows ? values.size(0) / rows : 1;
  Tensor out = at::zeros({atoms, columns}, values.options());
  const int64_t *owner = row_atom.const_data_ptr<int64_t>();
  check_owners(owner, rows, atoms);
  const int64_t *from = opposite.has_value() ? opposite->const_data_ptr<int64_t>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(values.scalar_type(), "segment_sum", [&] {
    const scalar_t *held = values.const_data_ptr<scalar_t>();
    scalar_t *sums = out.data_ptr<scalar_t>();
    const int64_t parts = at::get_num_threads();
    // Rows are in the order of their atoms; a part takes the atoms whose first row it holds.
    auto cut = [&](int64_t part) {
      int64_t r = rows * part / parts;
      while (r > 0 && r < rows && owner[r] == owner[r - 1]) ++r;
      return r;
    };
    at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = cut(begin), last = cut(end); r < last; ++r)
        for (int64_t k = 0; k < slots; ++k) {
          const scalar_t *row = held + (from ? from[r * slots + k] : r * slots + k) * columns;
          scalar_t *sum = sums + owner[r] * columns;
          for (int64_t c = 0; c < columns; ++c) sum[c] += row[c];
        }
    });
  });
  return out;
}

// Calls work(task, first, count) for each run of rows of one task; rows come structure by structure, so runs are long.
template <typename F> void each_run(const Tensor &task, const F &work) {
  const int64_t *of = task.const_data_ptr<int64_t>(), rows = task.size(0);
  for (int64_t first = 0, next; first < rows; first = next) {
    for (next = first + 1; next < rows && of[next] == of[first];) ++next;
    work(of[first], first, next - first);
  }
}

// Each row times the matrix of its task: x [N, I], weight [T, O, I], task [N] -> [N, O].
Tensor task_linear(const Tensor &x, const Tensor &weight, const Tensor &task) {
  Tensor out = at::empty({x.size(0), weight.size(1)}, x.options());
  each_run(task, [&](int64_t t, int64_t first, int64_t count) {
    Tensor rows = out.narrow(0, first, count);
    at::mm_out(rows, x.narrow(0, first, count), weight.select(0, t).t());
  });
  return out;
}

// Sum of outer products by task: g [N, O], x [N, I], task [N] -> [T, O, I].
Tensor task_outer(const Tensor &g, const Tensor &x, const Tensor &task, int64_t tasks) {
  Tensor out = at::zeros({tasks, g.size(1), x.size(1)}, x.options());
  each_run(task, [&](int64_t t, int64_t first, int64_t count) {
    out.select(0, t).addmm_(g.narrow(0, first, count).t(), x.narrow(0, first, count));
  });
  return out;
}

} // namespace

TORCH_LIBRARY(hydrazero, library) {
  library.def("segment_sum(Tensor row_atom, Tensor values, Tensor? opposite, int atoms) -> Tensor");
  library.def("task_linear(Tensor x, Tensor weight, Tensor task) -> Tensor");
  library.def("task_outer(Tensor g, Tensor x, Tensor task, int tasks) -> Tensor");
  library.def("pair_sum(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor directions, "
              "Tensor weight, Tensor? s, Tensor? y, Tensor? d, int atoms) -> (Tensor, Tensor)");
  library.def("pair_sum_transposed(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, "
              "Tensor directions, Tensor weight, Tensor? gs, Tensor gv, bool with_vectors) -> (Tensor, Tensor, Tensor)");
  library.def("pair_gradient(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, Tensor directions, "
              "Tensor weight, Tensor? s, Tensor? y, Tensor d, Tensor? gs, Tensor gv) -> (Tensor, Tensor)");
  library.def("pair_weight_gradient(Tensor row_atom, Tensor neighbours, Tensor mask, Tensor radial, "
              "Tensor directions, Tensor? s, Tensor? y, Tensor d, Tensor? gs, Tensor gv) -> Tensor");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("segment_sum", &segment_sum);
  library.impl("task_linear", &task_linear);
  library.impl("task_outer", &task_outer);
  library.impl("pair_sum", &pair_sum);
  library.impl("pair_sum_transposed", &pair_sum_transposed);
  library.impl("pair_gradient", &pair_gradient);
  library.impl("pair_weight_gradient", &pair_weight_gradient);
}
