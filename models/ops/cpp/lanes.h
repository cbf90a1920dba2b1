// Tiles of features in the vector registers of the processor, and slot layouts that the kernels walk through.
#pragma once

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

#define INLINE inline __attribute__((always_inline))
// Early enough for arrays of packs to become registers.
#define UNROLL _Pragma("GCC unroll 16")

constexpr int kSlots = 8;
constexpr int kTile = 16;      // features that a filter is made for at a time
constexpr int kAtomBlock = 32; // atoms whose radial functions stay in the cache over the tiles
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
// Slots whose filters are made together: as many independent sums as hide the latency of a product, in the registers
// there are (32 with AVX-512, else 16; 32 of half the size on ARM).
constexpr int kGroup = kVectorBytes == 64 ? 8 : 4;
constexpr int kSmallGroup = 4; // for rows that hold no more pairs

// Numbers side by side, as native vectors. Larger generic vectors would be left in memory by the compiler.
template <typename T, int kWidth> struct Pack {
  static constexpr int kBytes = kWidth * sizeof(T) < kVectorBytes ? kWidth * sizeof(T) : kVectorBytes;
  static constexpr int kParts = kWidth * sizeof(T) / kBytes;
  typedef T Vector __attribute__((vector_size(kBytes)));
  // In memory, where numbers lie at any address. A copy by memcpy would be left in pieces of half a register for vectors
  // of 64 bytes, and the load of the whole would wait until all of them are written.
  typedef T InMemory __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
  Vector part[kParts];

  static INLINE Pack zero() {
    Pack out;
    UNROLL
    for (auto &part : out.part) part = Vector{};
    return out;
  }
  static INLINE Pack load(const T *from) {
    Pack out;
    UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = *reinterpret_cast<const InMemory *>(from + i * kBytes / sizeof(T));
    return out;
  }
  INLINE void store(T *to) const {
    UNROLL
    for (int i = 0; i < kParts; ++i) *reinterpret_cast<InMemory *>(to + i * kBytes / sizeof(T)) = part[i];
  }
  INLINE void add_product(const Pack &a, const Pack &b) {
    UNROLL
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b.part[i];
  }
  INLINE void add_product(const Pack &a, T b) {
    UNROLL
    for (int i = 0; i < kParts; ++i) part[i] += a.part[i] * b;
  }
  INLINE Pack times(const Pack &other) const {
    Pack out;
    UNROLL
    for (int i = 0; i < kParts; ++i) out.part[i] = part[i] * other.part[i];
    return out;
  }
  INLINE T total() const {
    Vector sum = part[0];
    for (int i = 1; i < kParts; ++i) sum += part[i];
    T out = 0;
    for (int lane = 0; lane < (int)(kBytes / sizeof(T)); ++lane) out += sum[lane];
    return out;
  }
};

template <typename T> using Tile = Pack<T, kTile>;

// Which atom owns which rows, up to where each row is filled, and how the atoms are shared between threads.
struct Layout {
  int64_t atoms, rows;
  const int64_t *neighbours;
  std::vector<int64_t> first_row; // of each atom, and the number of rows at the end
  std::vector<uint8_t> filled;    // slots of each row up to its last one that holds a pair
  std::vector<int64_t> cuts;      // atoms at which the work is cut into equal parts, one for each thread
};

// What follows trusts these; a wrong batch must not write where it likes.
inline void check_owners(const int64_t *owner, int64_t rows, int64_t atoms) {
  for (int64_t r = 0; r < rows; ++r)
    TORCH_CHECK(owner[r] >= (r ? owner[r - 1] : 0) && owner[r] < atoms, "rows must be in the order of their atoms");
}

inline Layout layout_of(const Tensor &row_atom, const Tensor &neighbours, const Tensor &mask, int64_t atoms) {
  TORCH_CHECK(neighbours.size(1) == kSlots && neighbours.size(0) == row_atom.size(0) &&
                  mask.sizes() == neighbours.sizes(),
              "neighbours and their mask must be [rows, 8]");
  TORCH_CHECK(row_atom.is_contiguous() && neighbours.is_contiguous() && mask.is_contiguous(), "slots must be dense");
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
    for (int k = 0; k < kSlots; ++k) {
      const int64_t neighbour = out.neighbours[r * kSlots + k];
      TORCH_CHECK(neighbour >= 0 && neighbour < atoms, "a neighbour is none of the atoms");
      if (holds[r * kSlots + k]) filled = k + 1;
    }
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

// Calls work(first slot, std::integral_constant<int, K>) for each group of K slots of an atom that holds a pair.
template <typename F> INLINE void each_group(const Layout &layout, int64_t atom, const F &work) {
  for (int64_t r = layout.first_row[atom]; r < layout.first_row[atom + 1]; ++r)
    for (int k = 0; k < layout.filled[r]; k += kGroup) {
      if constexpr (kGroup > kSmallGroup) {
        if (layout.filled[r] <= kSmallGroup) {
          work(r * kSlots, std::integral_constant<int, kSmallGroup>());
          continue;
        }
      }
      work(r * kSlots + k, std::integral_constant<int, kGroup>());
    }
}

} // namespace
