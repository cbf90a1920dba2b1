// Sums over the rows of each atom, and linear layers whose matrices depend on a structure's task.

#include "lanes.h"

namespace {

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

TORCH_LIBRARY_FRAGMENT(hydrazero, library) {
  library.def("segment_sum(Tensor row_atom, Tensor values, Tensor? opposite, int atoms) -> Tensor");
  library.def("task_linear(Tensor x, Tensor weight, Tensor task) -> Tensor");
  library.def("task_outer(Tensor g, Tensor x, Tensor task, int tasks) -> Tensor");
}

TORCH_LIBRARY_IMPL(hydrazero, CPU, library) {
  library.impl("segment_sum", &segment_sum);
  library.impl("task_linear", &task_linear);
  library.impl("task_outer", &task_outer);
}
