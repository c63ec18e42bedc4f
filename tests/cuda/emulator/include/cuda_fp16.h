// float16, by the engine's own arithmetic, which other tests check against numpy's.
#pragma once

#include <string.h>

#include "core/dtype.h"

struct __half {
  freeio::Float16 bits;
};

inline float __half2float(__half value) { return freeio::Float16::widen(value.bits); }
inline __half __float2half_rn(float value) { return {freeio::Float16::round(value)}; }
