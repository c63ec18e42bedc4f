// Elements as one lane loads, sums and stores them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/dtype.h"
#include "cuda/device/cta.cuh"

namespace freeio::cuda {

// What one lane takes at a time, as it lies in memory. It is taken apart where it is used, not
// where it is loaded: else every load would wait for the one before.
template <int kBytes>
struct RawOf;
template <>
struct RawOf<16> {
  using Type = uint4;
};
template <>
struct RawOf<8> {
  using Type = uint2;
};
template <>
struct RawOf<4> {
  using Type = uint32_t;
};
template <>
struct RawOf<2> {
  using Type = uint16_t;
};
template <>
struct RawOf<1> {
  using Type = uint8_t;
};
template <typename Element, int kCount>
using Raw = typename RawOf<sizeof(Element) * kCount>::Type;

template <typename Element, int kCount>
__device__ Raw<Element, kCount> load_raw(const Element* from) {
  return *reinterpret_cast<const Raw<Element, kCount>*>(from);
}

template <typename Element, int kCount>
__device__ void store_raw(Element* to, const Raw<Element, kCount>& raw) {
  *reinterpret_cast<Raw<Element, kCount>*>(to) = raw;
}

// Widening and rounding as in core/dtype.h, by the GPU's own instructions where it has them. Only
// the payloads of NaNs differ.
template <typename Element, int kCount>
__device__ void widen(const Raw<Element, kCount>& raw,
                      typename Element::Accumulator (&values)[kCount]) {
  if constexpr (std::is_same_v<Element, BFloat16> && kCount % 2 == 0) {
    uint32_t words[kCount / 2];
    memcpy(words, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      values[i] = __uint_as_float(words[i / 2] << 16);
      values[i + 1] = __uint_as_float(words[i / 2] & 0xffff0000u);
    }
  } else if constexpr (std::is_same_v<Element, Float16>) {
    __half halves[kCount];
    memcpy(halves, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = __half2float(halves[i]);
  } else {
    Element elements[kCount];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = Element::widen(elements[i]);
  }
}

template <typename Element, int kCount>
__device__ Raw<Element, kCount> round_to(const typename Element::Accumulator (&values)[kCount]) {
  Raw<Element, kCount> raw;
  if constexpr (std::is_same_v<Element, BFloat16> && kCount % 2 == 0) {
    __nv_bfloat162 pairs[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      pairs[i / 2] = __floats2bfloat162_rn(values[i], values[i + 1]);
    }
    memcpy(&raw, pairs, sizeof(raw));
  } else if constexpr (std::is_same_v<Element, BFloat16>) {
    const __nv_bfloat16 value = __float2bfloat16_rn(values[0]);
    memcpy(&raw, &value, sizeof(raw));
  } else if constexpr (std::is_same_v<Element, Float16>) {
    __half halves[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) halves[i] = __float2half_rn(values[i]);
    memcpy(&raw, halves, sizeof(raw));
  } else {
    Element elements[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = Element::round(values[i]);
    memcpy(&raw, elements, sizeof(raw));
  }
  return raw;
}

// Adds an element each to sums: rows with their weight, and partial sums.
template <typename Element, int kCount>
__device__ void add_weighted(typename Element::Accumulator weight, const Raw<Element, kCount>& raw,
                             typename Element::Accumulator (&sums)[kCount]) {
  typename Element::Accumulator values[kCount];
  widen<Element, kCount>(raw, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (sizeof(Element) < sizeof(float)) {
      sums[i] = fma(weight, values[i], sums[i]);
    } else {
      sums[i] += weight * values[i];  // rounds twice, as on the CPU
    }
  }
}
template <typename Element, int kCount>
__device__ void add(const Raw<Element, kCount>& raw,
                    typename Element::Accumulator (&sums)[kCount]) {
  typename Element::Accumulator values[kCount];
  widen<Element, kCount>(raw, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] += values[i];
}

}  // namespace freeio::cuda
