// Products of node features of several degrees with a matrix for each degree, component by component: the rows of a
// component may lie apart, so that features need not be copied from the order of sums over neighbours, [A, C, F].

#include "lanes.h"

namespace {

inline void check_degrees(const Tensor &x, int64_t degrees) {
  TORCH_CHECK(x.dim() == 3 && x.size(1) == degrees * degrees, "features must be [atoms, ", degrees * degrees,
              ", features] for matrices of ", degrees, " degrees");
}

// Calls work(component, degree).
template <typename F> void each_component(int64_t degrees, const F &work) {
  for (int64_t degree = 0; degree < degrees; ++degree)
    for (int64_t c = degree * degree; c < (degree + 1) * (degree + 1); ++c) work(c, degree);
}

// Features [A, (L + 1)^2, I] times the matrix [I, O] of their degree: [A, (L + 1)^2, O].
Tensor degree_linear(const Tensor &x, const Tensor &weight) {
  check_degrees(x, weight.size(0));
  Tensor out = at::empty({x.size(0), x.size(1), weight.size(2)}, x.options());
  each_component(weight.size(0), [&](int64_t c, int64_t degree) {
    Tensor rows = out.select(1, c);
    at::mm_out(rows, x.select(1, c), weight.select(0, degree));
  });
  return out;
}

// The sums x^T g over the atoms and components of each degree: x [A, (L + 1)^2, I], g [A, (L + 1)^2, O] -> [L + 1, I, O].
Tensor degree_outer(const Tensor &x, const Tensor &g, int64_t degrees) {
  check_degrees(x, degrees);
  check_degrees(g, degrees);
  Tensor out = at::empty({degrees, x.size(2), g.size(2)}, x.options());
  each_component(degrees, [&](int64_t c, int64_t degree) {
    const double earlier = c == degree * degree ? 0 : 1; // what 0 multiplies is not read
    out.select(0, degree).addmm_(x.select(1, c).t(), g.select(1, c), earlier);
  });
  return out;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("degree_linear(Tensor x, Tensor weight) -> Tensor");
  library.def("degree_outer(Tensor x, Tensor g, int degrees) -> Tensor");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("degree_linear", &degree_linear);
  library.impl("degree_outer", &degree_outer);
}
