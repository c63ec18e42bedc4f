// Element types that combine can add up: widening to the accumulator, rounding once back.
#pragma once

#include <string.h>

#include <cstdint>

#include "core/host_device.h"

namespace freeio {

FREEIO_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

FREEIO_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// How a float type represents values beyond the largest finite one.
enum class Overflow { kInfinity, kNan };

// A float of 1 + kExponent + kMantissa bits, round to nearest even. kInfinity: the largest exponent
// is reserved for infinity and NaN, as in IEEE 754. kNan: only its all-ones code is NaN ("fn").
template <typename Storage, int kExponent, int kMantissa, Overflow kOverflow>
struct SmallFloat {
  using Accumulator = float;
  Storage storage;

  static constexpr int kBias = (1 << (kExponent - 1)) - 1;
  static constexpr uint32_t kMagnitude = (1u << (kExponent + kMantissa)) - 1;
  static constexpr uint32_t kTopExponent = ((1u << kExponent) - 1) << kMantissa;
  static constexpr uint32_t kMaxFinite =
      kOverflow == Overflow::kInfinity ? kTopExponent - 1 : kMagnitude - 1;
  static constexpr uint32_t kQuietNan =
      kOverflow == Overflow::kInfinity ? kTopExponent | (1u << (kMantissa - 1)) : kMagnitude;

  FREEIO_HOST_DEVICE static float widen(SmallFloat value) {
    const uint32_t sign = static_cast<uint32_t>(value.storage >> (kExponent + kMantissa)) << 31;
    const uint32_t magnitude = value.storage & kMagnitude;
    uint32_t wide;
    if (magnitude > kMaxFinite) {
      const bool infinite = kOverflow == Overflow::kInfinity && magnitude == kTopExponent;
      wide = infinite ? 0x7f800000u : 0x7fc00000u;
    } else if (magnitude >= (1u << kMantissa)) {
      wide = (magnitude << (23 - kMantissa)) + (static_cast<uint32_t>(127 - kBias) << 23);
    } else {
      // Subnormal: an integer multiple of the smallest step, exact in float.
      const float step = float_of(static_cast<uint32_t>(127 + 1 - kBias - kMantissa) << 23);
      wide = bits_of(static_cast<float>(magnitude) * step);
    }
    return float_of(sign | wide);
  }

  FREEIO_HOST_DEVICE static SmallFloat round(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t sign = (bits >> 31) << (kExponent + kMantissa);
    const uint32_t wide = bits & 0x7fffffffu;
    constexpr uint32_t kMinNormal = static_cast<uint32_t>(127 + 1 - kBias) << 23;
    uint32_t magnitude;
    if (wide > 0x7f800000u) {
      magnitude = kQuietNan;
    } else if (wide >= kMinNormal) {
      constexpr int kShift = 23 - kMantissa;
      const uint32_t even = ((1u << (kShift - 1)) - 1) + ((wide >> kShift) & 1);
      const uint32_t rebiased = wide - (static_cast<uint32_t>(127 - kBias) << 23);
      magnitude = (rebiased + even) >> kShift;
      if (magnitude > kMaxFinite) {
        magnitude = kOverflow == Overflow::kInfinity ? kTopExponent : kQuietNan;
      }
    } else {
      // Below the normal range: adding 2^23 smallest steps makes the float unit round to one.
      const float anchor = float_of(static_cast<uint32_t>(127 + 1 - kBias - kMantissa + 23) << 23);
      magnitude = bits_of(float_of(wide) + anchor) - bits_of(anchor);
    }
    return {static_cast<Storage>(sign | magnitude)};
  }
};

// bfloat16 is the upper half of a float, subnormals included.
struct BFloat16 {
  using Accumulator = float;
  uint16_t storage;

  FREEIO_HOST_DEVICE static float widen(BFloat16 value) {
    return float_of(static_cast<uint32_t>(value.storage) << 16);
  }

  FREEIO_HOST_DEVICE static BFloat16 round(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t nan = (bits >> 16) | 0x40u;
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : nearest)};
  }
};

template <typename T>
struct Exact {
  using Accumulator = T;
  T storage;

  FREEIO_HOST_DEVICE static T widen(Exact value) { return value.storage; }
  FREEIO_HOST_DEVICE static Exact round(T value) { return {value}; }
};

using Float64 = Exact<double>;
using Float32 = Exact<float>;
using Float16 = SmallFloat<uint16_t, 5, 10, Overflow::kInfinity>;
using Float8E5M2 = SmallFloat<uint8_t, 5, 2, Overflow::kInfinity>;
using Float8E4M3FN = SmallFloat<uint8_t, 4, 3, Overflow::kNan>;

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16, kFloat8E5M2, kFloat8E4M3FN };
constexpr DType kDTypes[] = {DType::kFloat64, DType::kFloat32,    DType::kBFloat16,
                             DType::kFloat16, DType::kFloat8E5M2, DType::kFloat8E4M3FN};
// As NumPy and ml_dtypes name them.
constexpr const char* kDTypeNames[] = {"float64", "float32",     "bfloat16",
                                       "float16", "float8_e5m2", "float8_e4m3fn"};

inline const char* name_of(DType dtype) { return kDTypeNames[static_cast<int>(dtype)]; }

template <typename Element>
struct ElementTag {
  using Type = Element;
};

// Calls `f` with the tag of the element type.
template <typename F>
void with_element_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(ElementTag<Float64>{});
    case DType::kFloat32:
      return f(ElementTag<Float32>{});
    case DType::kBFloat16:
      return f(ElementTag<BFloat16>{});
    case DType::kFloat16:
      return f(ElementTag<Float16>{});
    case DType::kFloat8E5M2:
      return f(ElementTag<Float8E5M2>{});
    case DType::kFloat8E4M3FN:
      return f(ElementTag<Float8E4M3FN>{});
  }
}

}  // namespace freeio
