// The Python module. Kernels get addresses as integers, and every one runs without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels.hpp"
#include "module.hpp"

namespace nb = nanobind;

namespace sparsecoll {
namespace {

using Address = std::uintptr_t;
using without_gil = nb::call_guard<nb::gil_scoped_release>;

std::byte* pointer(Address address) { return reinterpret_cast<std::byte*>(address); }

DType dtype_named(std::string_view name) {
    static constexpr std::array<std::pair<std::string_view, DType>, 9> dtypes{{
        {"float32", DType::float32},
        {"float64", DType::float64},
        {"bfloat16", DType::bfloat16},
        {"float16", DType::float16},
        {"int8", DType::int8},
        {"int16", DType::int16},
        {"int32", DType::int32},
        {"int64", DType::int64},
        {"uint8", DType::uint8},
    }};
    for (const auto& [known, dtype] : dtypes) {
        if (name == known) return dtype;
    }
    throw std::invalid_argument("_native: expected a known dtype, got " + std::string(name));
}

void bind_sum_rows(Address destination, bool destination_is_partial, const std::vector<Address>& sources,
                   const std::vector<bool>& sources_are_partial, std::int64_t num_elements, std::string_view dtype,
                   std::int64_t divisor, int num_threads) {
    std::vector<Row> rows(sources.size());
    for (std::size_t s = 0; s < rows.size(); ++s) rows[s] = {pointer(sources[s]), sources_are_partial.at(s)};
    sum_rows(pointer(destination), destination_is_partial, rows.data(), static_cast<std::int64_t>(rows.size()),
             num_elements, dtype_named(dtype), divisor, num_threads);
}

std::int64_t bind_sort_by_expert(Address expert_ids, std::int64_t num_assignments, std::int64_t num_experts,
                                 Address order, Address counts) {
    return sort_by_expert(pointer(expert_ids), num_assignments, num_experts, pointer(order), pointer(counts));
}

void bind_permute_rows(Address destination, Address source, Address index, std::int64_t num_rows,
                       std::int64_t row_bytes, int num_threads) {
    permute_rows(pointer(destination), pointer(source), pointer(index), num_rows, row_bytes, num_threads);
}

void bind_combine(Address destination, Address source, Address position, Address weight, std::int64_t num_tokens,
                  std::int64_t top_k, std::int64_t dim, std::string_view dtype, int num_threads) {
    const Routing routing{pointer(position), pointer(weight), num_tokens, top_k, dim};
    combine(pointer(destination), pointer(source), routing, dtype_named(dtype), num_threads);
}

void bind_combine_backward(Address d_source, Address d_weight, Address d_destination, Address source,
                           Address position, Address weight, std::int64_t num_tokens, std::int64_t top_k,
                           std::int64_t dim, std::string_view dtype, int num_threads) {
    const Routing routing{pointer(position), pointer(weight), num_tokens, top_k, dim};
    combine_backward(pointer(d_source), pointer(d_weight), pointer(d_destination), pointer(source), routing,
                     dtype_named(dtype), num_threads);
}

void bind_swiglu(Address destination, Address source, std::int64_t num_rows, std::int64_t dim, std::string_view dtype,
                 int num_threads) {
    swiglu(pointer(destination), pointer(source), num_rows, dim, dtype_named(dtype), num_threads);
}

void bind_swiglu_backward(Address d_source, Address activated, Address d_activated, Address source,
                          std::int64_t num_rows, std::int64_t dim, std::string_view dtype, int num_threads) {
    swiglu_backward(pointer(d_source), pointer(activated), pointer(d_activated), pointer(source), num_rows, dim,
                    dtype_named(dtype), num_threads);
}

void bind_gelu_backward(Address d_source, Address activated, Address d_activated, Address source,
                        std::int64_t num_elements, std::string_view dtype, int num_threads) {
    gelu_backward(pointer(d_source), pointer(activated), pointer(d_activated), pointer(source), num_elements,
                  dtype_named(dtype), num_threads);
}

}  // namespace

NB_MODULE(_native, module) {
    // Objects that a process still holds when it ends are no leak of ours.
    nb::set_leak_warnings(false);
    module.doc() = "Kernels on addresses, the planner, and the balancers. They check little: use sparsecoll.native.";
    module.def("sum_rows", &bind_sum_rows, without_gil());
    module.def("sort_by_expert", &bind_sort_by_expert, without_gil());
    module.def("permute_rows", &bind_permute_rows, without_gil());
    module.def("combine", &bind_combine, without_gil());
    module.def("combine_backward", &bind_combine_backward, without_gil());
    module.def("swiglu", &bind_swiglu, without_gil());
    module.def("swiglu_backward", &bind_swiglu_backward, without_gil());
    module.def("gelu_backward", &bind_gelu_backward, without_gil());
    add_planner(module);
    add_balancers(module);
}

}  // namespace sparsecoll
