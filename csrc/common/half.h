// The two half types as kernels read them: 16 bits, widened to float. Torch-free, and free of CUDA's headers.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace mlopt {

struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};

struct BFloat16 {  // the upper half of a float
  uint16_t bits;
};

MLOPT_HD float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MLOPT_HD uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MLOPT_HD float widened(BFloat16 x) { return float_of_bits(uint32_t(x.bits) << 16); }

MLOPT_HD float widened(Float16 x) {
#ifdef __CUDA_ARCH__
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
  return value;
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  if ((x.bits & 0x7fff) > 0x7c00) return float_of_bits(0x7fffffff);  // not a number: the one that devices make of it
  if ((x.bits & 0x7c00) == 0x7c00) return float_of_bits(sign | 0x7f800000);
  const float size = float_of_bits(rest) * 0x1p112f;  // from the one exponent's bias, 15, to the other's, 127
  return sign != 0 ? -size : size;
#endif
}

MLOPT_HD float widened(float x) { return x; }
MLOPT_HD double widened(double x) { return x; }

}  // namespace mlopt
