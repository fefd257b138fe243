// Assertions for tests that need no framework.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                           \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)

#define CHECK_NEAR(a, b, tolerance)                                                                \
  do {                                                                                             \
    const double a_ = (a), b_ = (b);                                                               \
    if (!(std::fabs(a_ - b_) <= (tolerance) * (1 + std::fabs(b_)))) {                              \
      std::fprintf(stderr, "%s:%d: %s = %.17g, expected %.17g\n", __FILE__, __LINE__, #a, a_, b_); \
      std::exit(1);                                                                                \
    }                                                                                              \
  } while (0)
