// The parts of the Python module, and how arrays come in and go out.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace sparsecoll {

template <class T, std::size_t Dimensions = 1>
using Input = nanobind::ndarray<const T, nanobind::ndim<Dimensions>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Output = nanobind::ndarray<nanobind::numpy, T, nanobind::ndim<1>>;

template <class T>
std::span<const T> span_of(const Input<T>& array) {
    return {array.data(), array.size()};
}

// An array that owns what it shows.
template <class T, class Owner>
Output<T> array_of(T* data, std::size_t size, Owner&& owner) {
    using Kept = std::remove_cvref_t<Owner>;
    auto kept = std::make_unique<Kept>(std::forward<Owner>(owner));
    nanobind::capsule capsule(kept.get(), [](void* held) noexcept { delete static_cast<Kept*>(held); });
    kept.release();
    return Output<T>(data, {size}, capsule);
}

template <class T>
Output<T> array_of(std::vector<T>&& values) {
    T* data = values.data();
    const std::size_t size = values.size();
    return array_of(data, size, std::move(values));
}

void add_planner(nanobind::module_& module);
void add_balancers(nanobind::module_& module);

}  // namespace sparsecoll
