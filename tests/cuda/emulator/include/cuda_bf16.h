// bfloat16, by the engine's own arithmetic, which other tests check against numpy's.
#pragma once

#include <string.h>

#include "core/dtype.h"

struct __nv_bfloat16 {
  freeio::BFloat16 bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat16 __float2bfloat16_rn(float value) { return {freeio::BFloat16::round(value)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
