// Marks functions that both the CPU and the CUDA kernels call, so that each formula exists once.
#pragma once

#ifdef __CUDACC__
#define MLOPT_HD __host__ __device__ inline
#else
#define MLOPT_HD inline
#endif
